"""A model as syncdoth/RetNet stores it: `config.json` and safetensors, buffers included."""

from __future__ import annotations

from typing import Any

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.formats.schedules import floats, language_model_log_decay
from retnet_tools.formats.spec import NameTable, Writing
from retnet_tools.formats.torchscale_writing import ACTIVATION_WORDS, buffers
from retnet_tools.formats.writer import CONFIG_FILE


def write(config: RetNetConfig, assumed_clamp: bool, shared: NameTable, glu: NameTable, plain: NameTable) -> Writing:
    """The files of a model; what syncdoth/RetNet cannot express is found when they are read back.

    Args:
        shared, glu, plain: the format's name tables.
    """
    table = {**shared, **(glu if config.feed_forward.kind == "glu" else plain)}
    names = {stored: canonical for stored, canonical in table.items() if canonical is not None}
    if config.tie_word_embeddings:
        names = {stored: canonical for stored, canonical in names.items() if canonical != "lm_head.weight"}
    return Writing(
        documents={CONFIG_FILE: _settings(config, assumed_clamp)},
        names=names,
        buffers={f"model.{name}": buffer for name, buffer in buffers(config).items()},
    )


def _settings(config: RetNetConfig, assumed_clamp: bool) -> dict[str, Any]:
    ffn, clamp = config.feed_forward, config.score_normalization.clamp
    deepnorm = config.residual_alpha != 1.0
    return {
        "model_type": "retnet",
        "architectures": ["RetNetForCausalLM"],
        "vocab_size": config.vocab_size,
        "decoder_embed_dim": config.hidden_size,
        "decoder_value_embed_dim": config.value_dim,
        "decoder_retention_heads": config.num_heads,
        "decoder_ffn_embed_dim": ffn.dim,
        "decoder_layers": config.num_layers,
        "decoder_normalize_before": config.norm_order == "pre",
        "activation_fn": ACTIVATION_WORDS.get(ffn.activation, ffn.activation),
        "use_glu": ffn.kind == "glu",
        "use_ffn_rms_norm": ffn.norm is not None and ffn.norm.kind == "rms",
        "use_lm_decay": bool(np.allclose(config.decay, floats(language_model_log_decay(config.num_heads)), atol=0)),
        "deepnorm": deepnorm,
        "subln": config.norm_order == "pre" and not deepnorm and (ffn.kind == "glu" or ffn.norm is not None),
        "layernorm_embedding": config.embedding_norm,
        "layernorm_eps": config.block_norm.eps,
        "no_scale_embedding": config.embedding_scale == 1.0,
        "tie_word_embeddings": config.tie_word_embeddings,
        # Not a key of syncdoth's: its releases differ in the clamp and its own files do not tell.
        **({} if clamp == "none" or assumed_clamp else {"score_clamp": clamp}),
    }
