"""The generations of torchscale's RetNet: their tensor names, and what each fixes in its code.

Since October 2023: RMSNorm, a gated feed-forward fc2(act(fc1 x) * gate x), no biases; a fork has LayerNorm.
Before: LayerNorm, fc2([norm] act(fc1 x)), biases everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from retnet_tools.config import FeedForwardKind, NormKind, ScoreClamp
from retnet_tools.errors import InputError
from retnet_tools.formats.spec import NameTable
from retnet_tools.formats.storage import StoredTensors

EMBEDDING = "embed_tokens.weight"
HEAD = "output_projection.weight"
FINAL_NORM = "layer_norm.weight"
FFN_NORM = "layers.0.ffn.ffn_layernorm.weight"
GATE = "layers.0.ffn.gate.weight"
NORM_BIAS = "layers.0.retention_layer_norm.bias"
ANGLES = "retnet_rel_pos.angle"
DECAYS = "retnet_rel_pos.decay"

_SHARED_NAMES: dict[str, str | None] = {
    EMBEDDING: "embedding.weight",
    HEAD: "lm_head.weight",
    "layernorm_embedding.weight": "embedding_norm.weight",
    "layers.{i}.retention_layer_norm.weight": "layers.{i}.retention_norm.weight",
    "layers.{i}.retention.q_proj.weight": "layers.{i}.retention.q_proj.weight",
    "layers.{i}.retention.k_proj.weight": "layers.{i}.retention.k_proj.weight",
    "layers.{i}.retention.v_proj.weight": "layers.{i}.retention.v_proj.weight",
    "layers.{i}.retention.g_proj.weight": "layers.{i}.retention.gate_proj.weight",
    "layers.{i}.retention.out_proj.weight": "layers.{i}.retention.out_proj.weight",
    "layers.{i}.final_layer_norm.weight": "layers.{i}.ffn_norm.weight",
    "layers.{i}.ffn.fc2.weight": "layers.{i}.ffn.down_proj.weight",
    FINAL_NORM: "final_norm.weight",
    "version": None,
    ANGLES: None,
    DECAYS: None,
}
_CURRENT_NAMES = {
    **_SHARED_NAMES,
    "layers.{i}.ffn.fc1.weight": "layers.{i}.ffn.gate_proj.weight",
    "layers.{i}.ffn.gate.weight": "layers.{i}.ffn.up_proj.weight",
}
_NORM_BIASES = {
    name.replace(".weight", ".bias"): canonical.replace(".weight", ".bias")
    for name, canonical in _SHARED_NAMES.items()
    if canonical is not None and "norm" in name
}
OLD_NAMES = {
    **_SHARED_NAMES,
    "layers.{i}.ffn.fc1.weight": "layers.{i}.ffn.up_proj.weight",
    "layers.{i}.ffn.ffn_layernorm.weight": "layers.{i}.ffn.norm.weight",
}
OLD_NAMES |= {
    stored.replace(".weight", ".bias"): canonical.replace(".weight", ".bias")
    for stored, canonical in OLD_NAMES.items()
    if canonical is not None and stored not in (EMBEDDING, HEAD)
}


@dataclass(frozen=True)
class Release:
    """What one generation of torchscale's code fixes.

    Attributes:
        gated, norm_bias: whether the first layer has a gate in its feed-forward network, and a bias in its norms: these
            tell the generation.
        biases: whether projections have biases.
        head_norm_eps: None where it is the one of the blocks.
    """

    version: str
    gated: bool
    norm_bias: bool
    names: NameTable
    norm: NormKind
    biases: bool
    feed_forward: FeedForwardKind
    norm_eps: float
    head_norm_eps: float | None
    clamp: ScoreClamp


RELEASES = (
    Release(
        version="torchscale (since October 2023)",
        gated=True,
        norm_bias=False,
        names=_CURRENT_NAMES,
        norm="rms",
        biases=False,
        feed_forward="glu",
        norm_eps=1e-6,
        head_norm_eps=None,
        clamp="sum_of_abs",
    ),
    Release(
        version="torchscale (since October 2023, with LayerNorm)",
        gated=True,
        norm_bias=True,
        names={**_CURRENT_NAMES, **_NORM_BIASES},
        norm="layer",
        biases=False,
        feed_forward="glu",
        norm_eps=1e-6,
        head_norm_eps=None,
        clamp="sum_of_abs",
    ),
    Release(
        version="torchscale (before October 2023)",
        gated=False,
        norm_bias=True,
        names=OLD_NAMES,
        norm="layer",
        biases=True,
        feed_forward="plain",
        norm_eps=1e-5,
        head_norm_eps=1e-6,
        clamp="abs_of_sum",
    ),
)


def find_release(stored: StoredTensors) -> Release:
    """The generation that wrote these tensors.

    Raises:
        InputError: none.
    """
    gated, norm_bias = GATE in stored.locations, NORM_BIAS in stored.locations
    for release in RELEASES:
        if (release.gated, release.norm_bias) == (gated, norm_bias):
            return release
    raise InputError("tensors of no known torchscale release", f"either {GATE!r} or {NORM_BIAS!r}")
