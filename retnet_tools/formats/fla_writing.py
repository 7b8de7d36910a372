"""A model as flash-linear-attention stores it: `config.json` and safetensors, rotation in halves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retnet_tools.config import Activation, RetNetConfig
from retnet_tools.formats.spec import NameTable, Transform, Writing
from retnet_tools.formats.writer import CONFIG_FILE


def write(
    config: RetNetConfig, table: NameTable, transforms: Mapping[str, Transform], activations: Mapping[str, Activation]
) -> Writing:
    """The files of a model; what flash-linear-attention cannot express is found when they are read back.

    Args:
        table, transforms, activations: the format's own, as for reading.
    """
    names = {stored: canonical for stored, canonical in table.items() if canonical is not None}
    if config.tie_word_embeddings:
        names = {stored: canonical for stored, canonical in names.items() if canonical != "lm_head.weight"}
    return Writing(
        documents={CONFIG_FILE: _settings(config, {word: name for name, word in reversed(list(activations.items()))})},
        names=names,
        transforms=transforms,
    )


def _settings(config: RetNetConfig, words: Mapping[Activation, str]) -> dict[str, Any]:
    return {
        "model_type": "retnet",
        "architectures": ["RetNetForCausalLM"],
        "attn_mode": "chunk",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "expand_k": config.key_dim / config.hidden_size,
        "expand_v": config.value_dim / config.hidden_size,
        "feature_map": None if config.feature_map is None else words[config.feature_map],
        "hidden_act": words["silu" if config.gate is None else config.gate],
        "use_output_gate": config.gate is not None,
        "use_short_conv": False,
        "intermediate_size": config.feed_forward.dim,
        "elementwise_affine": config.head_norm.weight != "none",
        "norm_eps": config.block_norm.eps,
        "fuse_norm": True,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
