"""Jamie-Stirling/RetNet, the real-valued one: a bare state dict of a stack without embedding and head.

Each head has matrices of its own, `[D, K]`, used as x W. Its xPos scales q by z^(n/512) and k by z^(-m/512) for each
pair of key dimensions, which is a decay of z^(1/512) a step: exact, and bounded at any position. So its state is ours
divided by z^(n/512). The arguments of its `RetNet` may lie beside as JSON; the tensors tell them all.

Gammas are made with the model, in float32; frequencies at each call, in the dtype that torch defaults to, so they are
taken as they are in float64.
"""

from __future__ import annotations

import itertools

import numpy as np

from retnet_tools.config import BlockNorm, FeedForward, HeadNorm, RetNetConfig, ScoreNormalization
from retnet_tools.errors import InputError
from retnet_tools.formats.mapping import TRANSPOSED, joined_heads
from retnet_tools.formats.schedules import floats, language_model_gammas, read_xpos
from retnet_tools.formats.settings import TRAINING, Keys, Settings, words
from retnet_tools.formats.spec import FormatSpec, Reading, Source, module_names
from retnet_tools.formats.storage import StoredTensors

ORIGIN = "Jamie-Stirling"
MARK = "retentions.0.retentions.0.W_Q"
GATE, FFN = "retentions.0.W_G", "ffns.0.0.weight"
SCALE = "retentions.{i}.retentions.{h}.xpos.scale"
EPS = 1e-5
LAYER = {
    "layer_norms_1.{i}": "retention_norm",
    "retentions.{i}.group_norm": "retention.head_norm",
    "layer_norms_2.{i}": "ffn_norm",
    "ffns.{i}.0": "ffn.up_proj",
    "ffns.{i}.2": "ffn.down_proj",
}
PROJECTIONS = {
    **{f"retentions.{{i}}.retentions.{{h}}.W_{x}": f"layers.{{i}}.retention.{x.lower()}_proj.weight" for x in "QKV"},
    "retentions.{i}.W_G": "layers.{i}.retention.gate_proj.weight",
    "retentions.{i}.W_O": "layers.{i}.retention.out_proj.weight",
}
NAMES = {
    **module_names({name: f"layers.{{i}}.{canonical}" for name, canonical in LAYER.items()}),
    **PROJECTIONS,
    SCALE: None,
}


def _read(source: Source) -> Reading:
    """Sizes are those of the arguments and, where there are none, of the tensors."""
    stored = source.stored
    for name in stored.names():
        if name.endswith(".theta"):
            found = f"tensor {name!r} belongs to the complex-valued RetNet of {ORIGIN}"
            raise InputError(found, "its real-valued one", "this kind of model is not supported")
    for name in (MARK, GATE, FFN):
        if len(stored.locations[name].shape if name in stored.locations else ()) != 2:
            raise InputError(f"no matrix {name!r}", f"the tensors of a {ORIGIN} RetNet", "name its file")
    key_decay = read_xpos(source, SCALE, stored.locations[MARK].shape[1])
    config = _resolve(source.settings, stored, key_decay)
    heads = joined_heads(config.num_heads)
    transforms = {to: heads if "{h}" in name else TRANSPOSED for name, to in PROJECTIONS.items()}
    return Reading(config, ORIGIN, NAMES, transforms=transforms)


def _resolve(settings: Settings, stored: StoredTensors, key_decay: tuple[float, ...]) -> RetNetConfig:
    """The configuration: sizes, schedules as its code computes them, and what that code fixes."""
    hidden = settings.count("hidden_dim", stored.locations[GATE].shape[0])
    heads = settings.count("heads", _count(stored, "retentions.0.retentions.{}.W_Q"))
    head_k_dim = stored.locations[MARK].shape[1]
    if head_k_dim * heads != hidden:
        raise settings.wrong("heads", heads, f"hidden_dim = {hidden} over the {head_k_dim} columns of {MARK!r}")
    ffn_dim = settings.count("ffn_size", stored.locations[FFN].shape[0])
    value_dim = hidden * (1 + settings.flag("double_v_dim", stored.locations[GATE].shape[1] == 2 * hidden))
    return RetNetConfig(
        vocab_size=0,
        hidden_size=hidden,
        num_layers=settings.count("layers", _count(stored, "retentions.{}.W_G")),
        num_heads=heads,
        key_dim=hidden,
        value_dim=value_dim,
        decay=floats(np.log(language_model_gammas(heads).astype(np.float64))),
        key_decay=key_decay,
        rotary_frequencies=floats(10000.0 ** -(np.arange(0, head_k_dim, 2) / head_k_dim)),
        score_normalization=ScoreNormalization(1.0, by_decay=False, clamp="none"),
        head_norm=HeadNorm("layer", EPS, "channel", bias=True),
        block_norm=BlockNorm("layer", EPS, bias=True),
        feed_forward=FeedForward("plain", ffn_dim, "gelu", bias=True),
        final_norm=False,
    )


def _count(stored: StoredTensors, template: str) -> int:
    return next(i for i in itertools.count() if template.format(i) not in stored.locations)


JAMIE_STIRLING = FormatSpec(
    name="jamie-stirling",
    layout="Jamie-Stirling/RetNet",
    keys=Keys(read=words("double_v_dim ffn_size heads hidden_dim layers"), inert=TRAINING),
    is_settings=lambda document: {"layers", "hidden_dim", "ffn_size", "heads"} <= document.keys(),
    settings_words="layers, hidden_dim, ffn_size and heads",
    marks=("retentions.0.W_G", "layer_norms_1.0.weight"),
    names=NAMES,
    read=_read,
    needs_settings=False,
)
