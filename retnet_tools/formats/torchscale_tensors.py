"""The tensors of torchscale's RetNet, most of which its relatives share: names, generations, buffers.

Since October 2023: RMSNorm, a gated feed-forward fc2(act(fc1 x) * gate x), no biases; a fork has LayerNorm.
Before: LayerNorm, fc2([norm] act(fc1 x)), biases everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from retnet_tools.config import Activation, FeedForwardKind, NormKind, RetNetConfig, ScoreClamp
from retnet_tools.errors import InputError
from retnet_tools.formats import schedules
from retnet_tools.formats.settings import Settings, words
from retnet_tools.formats.spec import NameTable, Source, in_layers, module_names
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.weights import Array

EMBEDDING, HEAD = "embed_tokens.weight", "output_projection.weight"
FINAL_NORM, FFN_NORM = "layer_norm.weight", "layers.0.ffn.ffn_layernorm.weight"
ANGLES, DECAYS = "retnet_rel_pos.angle", "retnet_rel_pos.decay"
ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "swish": "silu", "relu": "relu"}
KEYS = words(
    """
    activation_fn decoder_embed_dim decoder_ffn_embed_dim decoder_layers decoder_normalize_before
    decoder_retention_heads decoder_value_embed_dim deepnorm layernorm_embedding layernorm_eps no_scale_embedding subln
    vocab_size
    """
)
_LAYER = {
    "retention_layer_norm": "retention_norm",
    **{f"retention.{x}_proj": f"retention.{x}_proj" for x in "qkv"},
    "retention.g_proj": "retention.gate_proj",
    "retention.out_proj": "retention.out_proj",
    "final_layer_norm": "ffn_norm",
    "ffn.fc2": "ffn.down_proj",
}
_FFN = {
    "glu": {"ffn.fc1": "ffn.gate_proj", "ffn.gate": "ffn.up_proj"},
    "plain": {"ffn.fc1": "ffn.up_proj", "ffn.ffn_layernorm": "ffn.norm"},
}


def decoder_names(kind: str, prefix: str = "", head: str = "output_projection") -> NameTable:
    """The names of a decoder with this feed-forward network, behind a prefix; the head stands outside of it."""
    modules = {
        f"{prefix}embed_tokens": "embedding",
        head: "lm_head",
        f"{prefix}layernorm_embedding": "embedding_norm",
        **in_layers(f"{prefix}layers", _LAYER),
        f"{prefix}layer_norm": "final_norm",
        **in_layers(f"{prefix}layers", _FFN[kind]),
    }
    return {**module_names(modules), prefix + ANGLES: None, prefix + DECAYS: None}


@dataclass(frozen=True)
class Release:
    """What one generation of torchscale's code fixes; the norm and the feed-forward network of the first layer tell it.

    Attributes:
        norm_eps: where the configuration does not say.
        head_norm_eps: None where it is the one of the blocks.
    """

    version: str
    feed_forward: FeedForwardKind
    norm: NormKind
    norm_eps: float
    head_norm_eps: float | None
    clamp: ScoreClamp


RELEASES = (
    Release("torchscale (since October 2023)", "glu", "rms", 1e-6, None, "sum_of_abs"),
    Release("torchscale (since October 2023, with LayerNorm)", "glu", "layer", 1e-6, None, "sum_of_abs"),
    Release("torchscale (before October 2023)", "plain", "layer", 1e-5, 1e-6, "abs_of_sum"),
)


def find_release(stored: StoredTensors) -> Release:
    """The generation that wrote these tensors; an `InputError` where none did."""
    gate, norm_bias = "layers.0.ffn.gate.weight", "layers.0.retention_layer_norm.bias"
    kind = "glu" if gate in stored.locations else "plain"
    norm = "layer" if norm_bias in stored.locations else "rms"
    for release in RELEASES:
        if (release.feed_forward, release.norm) == (kind, norm):
            return release
    raise InputError("tensors of no known torchscale release", f"either {gate!r} or {norm_bias!r}")


def decoder_fields(
    settings: Settings, embed: int, heads: int, layers: int, *, pre: bool, deepnorm: bool, scaled: bool = False
) -> dict[str, Any]:
    """Fields of the configuration that torchscale and its relatives resolve alike.

    Args:
        scaled: whether the embedding is scaled where the settings do not say.
    """
    return {
        "hidden_size": embed,
        "num_layers": layers,
        "num_heads": heads,
        "key_dim": embed,
        "norm_order": "pre" if pre else "post",
        "residual_alpha": (2.0 * layers) ** 0.25 if deepnorm else 1.0,
        "final_norm": pre,
        "embedding_scale": 1.0 if settings.flag("no_scale_embedding", not scaled) else math.sqrt(embed),
        "embedding_norm": settings.flag("layernorm_embedding", False),
    }


def read_buffers(
    source: Source, prefix: str, num_heads: int, head_k_dim: int, *, language_model: bool = False
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """log(gamma) per head and radians per position for each pair, which the model runs with.

    Args:
        language_model: whether the configuration names that decay, and not the paper's.

    Raises:
        InputError: as `schedules.read_angles` and `schedules.read_named`.
    """
    frequencies, name = schedules.read_angles(source, prefix + ANGLES, head_k_dim), prefix + DECAYS
    decays = [schedules.paper_log_decay(num_heads), language_model_log_decay(num_heads)]
    formulas = ["gamma = 1 - 2^(-5-h)", "gamma = 1 - exp(linspace(log 1/32, log 1/512))"]
    expected = f"{formulas[language_model]}, as the configuration says"
    held, action = f"tensor {name!r} holds {formulas[not language_model]}", "correct the configuration (use_lm_decay)"
    refusal = InputError(held, expected, action)
    decay = schedules.read_named(source, name, decays[language_model], decays[not language_model], refusal)
    return schedules.floats(decay), frequencies


def language_model_log_decay(num_heads: int) -> Array:
    """log of `language_model_gammas`, float32 `[H]`."""
    return schedules.log_float32(schedules.language_model_gammas(num_heads))


def written_buffers(config: RetNetConfig, prefix: str = "") -> dict[str, Array]:
    """The two buffers of torchscale's `RetNetRelPos`, by name.

    float32 as torchscale keeps them where that is exact; else float64, which it rounds as it loads.
    """
    buffers = {prefix + ANGLES: np.repeat(config.rotary_frequencies, 2), prefix + DECAYS: np.array(config.decay)}
    narrow = {name: buffer.astype(np.float32) for name, buffer in buffers.items()}
    return {name: narrow[name] if np.array_equal(narrow[name], exact) else exact for name, exact in buffers.items()}


def written_sizes(config: RetNetConfig) -> dict[str, Any]:
    """What torchscale and syncdoth both write of a model, by their keys."""
    activation = config.feed_forward.activation
    return {
        "decoder_embed_dim": config.hidden_size,
        "decoder_value_embed_dim": config.value_dim,
        "decoder_retention_heads": config.num_heads,
        "decoder_ffn_embed_dim": config.feed_forward.dim,
        "decoder_layers": config.num_layers,
        "decoder_normalize_before": config.norm_order == "pre",
        "activation_fn": {to: word for word, to in ACTIVATIONS.items()}.get(activation, activation),
    }
