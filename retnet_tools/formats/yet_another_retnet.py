"""fkodom/yet-another-retnet: a bare state dict, with the keyword arguments of its `RetNet` as JSON beside it.

The number of heads, the order of the norms, the activation and the epsilon are in those arguments alone. Decay is not
stored: its code computes it in the dtype of the activations. Rotary angles are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from retnet_tools.config import Activation, BlockNorm, FeedForward, HeadNorm, RetNetConfig, ScoreNormalization
from retnet_tools.errors import InputError
from retnet_tools.formats.files import CheckpointFiles
from retnet_tools.formats.schedules import floats, linspace_frequencies
from retnet_tools.formats.settings import Settings
from retnet_tools.formats.spec import FormatSpec, NameTable, Reading
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.paper import language_model_decay

ORIGIN = "yet-another-retnet"
ANGLES = "decoder.layers.{i}.retention.thetas"
MARK = ANGLES.format(i=0)
HEAD_NORM_EPS = 1e-6
ACTIVATIONS: dict[str, Activation] = {"swish": "silu", "gelu": "gelu", "relu": "relu"}
_LAYER = {
    "norm1": "retention_norm",
    "retention.q_proj": "retention.q_proj",
    "retention.k_proj": "retention.k_proj",
    "retention.v_proj": "retention.v_proj",
    "retention.g_proj": "retention.gate_proj",
    "retention.out_proj": "retention.out_proj",
    "norm2": "ffn_norm",
    "linear1": "ffn.up_proj",
    "linear2": "ffn.down_proj",
}
NAMES: NameTable = {
    "embedding.weight": "embedding.weight",
    **{
        f"decoder.layers.{{i}}.{stored}.{part}": f"layers.{{i}}.{canonical}.{part}"
        for stored, canonical in _LAYER.items()
        for part in ("weight", "bias")
    },
    "out.weight": "lm_head.weight",
    "out.bias": "lm_head.bias",
    ANGLES: None,
}
ROUNDED = "rotary angles are rounded in the file: computed from the published schedule instead"


def _is_settings(document: Mapping[str, Any]) -> bool:
    return {"num_tokens", "d_model", "nhead"} <= document.keys()


def detect(files: CheckpointFiles) -> bool:
    """Its arguments as JSON beside the weights, or its names of tensors."""
    return files.has_settings_or_tensor(_is_settings, MARK)


def read(files: CheckpointFiles) -> Reading:
    """Resolve the arguments of `RetNet`.

    Raises:
        InputError: no arguments beside the weights, or ones that describe no model.
    """
    found = [(path, Settings(ORIGIN, document)) for path, document in files.configs.items() if _is_settings(document)]
    if not found:
        raise InputError(
            f"no {ORIGIN} configuration beside {files.path}",
            "an args.json with num_tokens, d_model, nhead and the other arguments of its RetNet",
            "write the keyword arguments of RetNet as args.json beside it",
        )
    path, settings = found[0]
    heads, embed = settings.count("nhead", 8), settings.count("d_model", 512)
    if embed % heads:
        raise InputError(f"the {ORIGIN} configuration has nhead = {heads}", f"a divisor of d_model = {embed}")
    frequencies, notes = _frequencies(files.tensors, embed // heads)
    config = resolve(settings, frequencies)
    return Reading(config, ORIGIN, NAMES, config_files=(path,), notes=notes)


def resolve(settings: Settings, frequencies: tuple[float, ...]) -> RetNetConfig:
    """The configuration, with the defaults of `RetNet` filled in."""
    embed, heads = settings.count("d_model", 512), settings.count("nhead", 8)
    activation = settings.choice("activation", ACTIVATIONS, "swish")
    return RetNetConfig(
        vocab_size=settings.count("num_tokens"),
        hidden_size=embed,
        num_layers=settings.count("num_layers", 6),
        num_heads=heads,
        key_dim=embed,
        value_dim=embed,
        decay=language_model_decay(heads),
        rotary_frequencies=frequencies,
        score_normalization=ScoreNormalization((embed // heads) ** -0.5, by_decay=False, clamp="none"),
        head_norm=HeadNorm("layer", HEAD_NORM_EPS),
        block_norm=BlockNorm("layer", settings.number("layer_norm_eps", 1e-6), bias=True),
        feed_forward=FeedForward("plain", settings.count("dim_feedforward", 2048), activation, bias=True),
        gate=activation,
        norm_order="pre" if settings.flag("norm_first", True) else "branch",
        final_norm=False,
        projection_bias=True,
        head_bias=True,
    )


def _frequencies(stored: StoredTensors, head_k_dim: int) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """The stored angles, each twice for its pair, or the published ones where a half type rounds them."""
    location = stored.locations.get(MARK)
    if location is None:
        raise InputError(f"no tensor {MARK!r}", "rotary angles: a model without relative positions is not supported")
    if location.shape != (head_k_dim,):
        raise InputError(f"tensor {MARK!r} has shape {list(location.shape)}", f"[{head_k_dim}], d_model / nhead")
    if location.dtype.name not in ("float32", "float64"):
        return floats(linspace_frequencies(head_k_dim)), (ROUNDED,)
    angles = stored.read(MARK)
    if not np.array_equal(angles[0::2], angles[1::2]):
        raise InputError(f"tensor {MARK!r} has pairs of different angles", "each angle twice in a row")
    return floats(angles[0::2]), ()


YET_ANOTHER_RETNET = FormatSpec(
    name=ORIGIN,
    looked_for="weights with a JSON beside that holds num_tokens, d_model and nhead",
    detect=detect,
    read=read,
)
