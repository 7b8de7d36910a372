"""A model as torchscale stores it: a bare state dict `model.pt` with `vars(RetNetConfig)` as `args.json`.

`RetNetDecoder.load_state_dict(torch.load("model.pt"))` takes it strictly: buffers are stored too, and a tied output
projection under both names.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.formats.spec import Writing
from retnet_tools.formats.torchscale_releases import ANGLES, DECAYS, EMBEDDING, HEAD, RELEASES
from retnet_tools.weights import Array

ACTIVATION_WORDS: dict[str, str] = {"gelu": "gelu", "silu": "swish", "relu": "relu"}


def write(config: RetNetConfig, assumed_clamp: bool) -> Writing:
    """The files of a model; what torchscale cannot express is found when they are read back."""
    biases, gated = config.projection_bias, config.feed_forward.kind == "glu"
    layer = config.block_norm.kind == "layer"
    release = next((r for r in RELEASES if (r.gated, r.norm_bias, r.biases) == (gated, layer, biases)), RELEASES[0])
    names = {stored: canonical for stored, canonical in release.names.items() if canonical is not None}
    if config.tie_word_embeddings:
        del names[HEAD]
    return Writing(
        documents={"args.json": _settings(config, assumed_clamp)},
        names=names,
        weights_file="model.pt",
        ties={HEAD: EMBEDDING} if config.tie_word_embeddings else {},
        buffers=buffers(config),
    )


def buffers(config: RetNetConfig) -> dict[str, Array]:
    """The two buffers of torchscale's `RetNetRelPos`, by name."""
    return {ANGLES: np.repeat(_buffer(config.rotary_frequencies), 2), DECAYS: _buffer(config.decay)}


def _buffer(values: tuple[float, ...]) -> Array:
    """float32 as torchscale keeps it where that is exact; else float64, which torchscale rounds as it loads."""
    exact = np.array(values)
    narrow = exact.astype(np.float32)
    return narrow if np.array_equal(narrow, exact) else exact


def _settings(config: RetNetConfig, assumed_clamp: bool) -> dict[str, Any]:
    deepnorm = config.residual_alpha != 1.0
    paper_clamp = config.score_normalization.clamp == "abs_of_sum" and config.feed_forward.kind == "glu"
    return {
        "decoder_embed_dim": config.hidden_size,
        "decoder_value_embed_dim": config.value_dim,
        "decoder_retention_heads": config.num_heads,
        "decoder_ffn_embed_dim": config.feed_forward.dim,
        "decoder_layers": config.num_layers,
        "decoder_normalize_before": config.norm_order == "pre",
        "activation_fn": ACTIVATION_WORDS.get(config.feed_forward.activation, config.feed_forward.activation),
        "no_scale_embedding": config.embedding_scale == 1.0,
        "layernorm_embedding": config.embedding_norm,
        "deepnorm": deepnorm,
        "subln": not deepnorm and config.norm_order == "pre",
        "share_decoder_input_output_embed": config.tie_word_embeddings,
        "layernorm_eps": config.block_norm.eps,
        "vocab_size": config.vocab_size,
        "torchscale_version": None if assumed_clamp else "0.3.0" if paper_clamp else "main",
    }
