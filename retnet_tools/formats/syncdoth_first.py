"""syncdoth/RetNet's first layout, until October 2023: `RetNetModelWithLMHead`, with q, k and v in one matrix.

Rotation and xPos run over all of `qk_dim` before it is cut into heads, so each head has frequencies and a decay per key
dimension of its own: pair j of all K_total/2 turns by 10000^(-j / (K_total/2)) and decays by z_j^(1/512), z_j =
(2j + 0.4 K_total) / 1.4 K_total. Its state is ours divided by z^(n/512).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from retnet_tools.config import BlockNorm, FeedForward, HeadNorm, RetNetConfig, ScoreNormalization
from retnet_tools.errors import InputError
from retnet_tools.formats.buffers import holds, name_of_all, read_buffer
from retnet_tools.formats.inert import HUGGING_FACE, TRAINING
from retnet_tools.formats.mapping import check_tie, is_tied
from retnet_tools.formats.schedules import floats, language_model_gammas
from retnet_tools.formats.settings import Keys, Settings, words
from retnet_tools.formats.spec import FormatSpec, Reading, Source, Transform
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.formats.transforms import row_range
from retnet_tools.formats.xpos import xpos_key_decay

EMBEDDING, HEAD = "model.embedding.weight", "lm_head.weight"
BLOCK = "model.blocks.{i}"
DECAY, SCALE = f"{BLOCK}.msr.decay", f"{BLOCK}.msr.xpos.scale"
EPS = 1e-5
SAME_GAMMAS = 1e-6
QKV = tuple(f"layers.{{i}}.retention.{name}_proj" for name in "qkv")
_LAYER = {
    "msr.gated": "retention.gate_proj",
    "msr.proj": "retention.out_proj",
    "ffn.0": "ffn.up_proj",
    "ffn.2": "ffn.down_proj",
    "ln1": "retention_norm",
    "ln2": "ffn_norm",
}
NAMES: dict[str, str | tuple[str, ...] | None] = {
    EMBEDDING: "embedding.weight",
    HEAD: "lm_head.weight",
    **{f"{BLOCK}.msr.qkv.{part}": tuple(f"{name}.{part}" for name in QKV) for part in ("weight", "bias")},
    **{
        f"{BLOCK}.{stored}.{part}": f"layers.{{i}}.{canonical}.{part}"
        for stored, canonical in _LAYER.items()
        for part in ("weight", "bias")
    },
    DECAY: None,
    SCALE: None,
}
KEYS = Keys(
    read=words(
        """
        ffn_proj_size hidden_size num_heads num_layers qk_dim tie_word_embeddings use_bias_in_mlp use_bias_in_msr
        use_bias_in_msr_out use_default_gamma v_dim vocab_size
        """
    ),
    inert=HUGGING_FACE | TRAINING | words("chunk_size forward_impl"),
)


def is_settings(document: Mapping[str, Any]) -> bool:
    """A configuration of model_type retnet with a size of q and k."""
    return document.get("model_type", "retnet") == "retnet" and {"qk_dim", "hidden_size"} <= document.keys()


def read(source: Source) -> Reading:
    """Resolve the configuration of syncdoth's first layout.

    Raises:
        InputError: sizes that do not divide, layers of different decay, a tied head that differs from the embedding.
    """
    settings, stored = source.settings, source.stored
    config, notes = resolve(settings, stored)
    names = dict(NAMES)
    if config.tie_word_embeddings:
        names[HEAD] = None
        check_tie(stored, HEAD, EMBEDDING)
    transforms: dict[str, Transform] = {}
    sizes = (config.key_dim, config.key_dim, config.value_dim)
    for i, name in enumerate(QKV):
        rows = row_range(sum(sizes[:i]), sizes[i], sum(sizes))
        transforms |= {f"{name}.weight": rows, f"{name}.bias": rows}
    return Reading(
        config,
        "syncdoth/RetNet (until October 2023)",
        names,
        transforms=transforms,
        zeros=_zero_biases(settings, config),
        notes=notes,
    )


def _zero_biases(settings: Settings, config: RetNetConfig) -> frozenset[str]:
    """The biases that this model does not have, where others of its projections have one."""
    if not config.projection_bias:
        return frozenset()
    zero = ["layers.{i}.retention.gate_proj.bias"]
    if not settings.flag("use_bias_in_msr", False):
        zero += [f"{name}.bias" for name in QKV]
    if not settings.flag("use_bias_in_msr_out", False):
        zero.append("layers.{i}.retention.out_proj.bias")
    return frozenset(zero)


def resolve(settings: Settings, stored: StoredTensors) -> tuple[RetNetConfig, tuple[str, ...]]:
    """The configuration, with the defaults of its classes filled in, and notes."""
    heads, key_dim = settings.size("num_heads", 8), settings.size("qk_dim", 2048)
    value_dim, layers = settings.size("v_dim", 4096), settings.size("num_layers", 24)
    for name, size in (("qk_dim", key_dim), ("v_dim", value_dim)):
        if size % heads:
            raise settings.wrong(name, size, f"a multiple of num_heads = {heads}")
    decay, notes = _decay(settings, stored, heads)
    key_decay, scale_notes = xpos_key_decay(stored, name_of_all(stored, SCALE), key_dim)
    # Made at each call, in the dtype that torch defaults to.
    frequencies = 10000.0 ** -(np.arange(key_dim // 2) / (key_dim // 2))
    tied = settings.flag("tie_word_embeddings", is_tied(stored, HEAD, EMBEDDING))
    config = RetNetConfig(
        vocab_size=settings.size("vocab_size", 50257),
        hidden_size=settings.size("hidden_size", 2048),
        num_layers=layers,
        num_heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        decay=decay,
        key_decay=key_decay,
        rotary_frequencies=floats(frequencies),
        score_normalization=ScoreNormalization((key_dim // heads) ** -0.5, by_decay=False, clamp="none"),
        head_norm=HeadNorm("layer", EPS),
        block_norm=BlockNorm("layer", EPS, bias=True),
        feed_forward=FeedForward(
            "plain", settings.size("ffn_proj_size", 4096), "gelu", bias=settings.flag("use_bias_in_mlp", True)
        ),
        final_norm=False,
        projection_bias=settings.flag("use_bias_in_msr", False) or settings.flag("use_bias_in_msr_out", False),
        tie_word_embeddings=tied,
    )
    return config, (*notes, *scale_notes)


def _decay(settings: Settings, stored: StoredTensors, heads: int) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """log(gamma) of the gammas that every layer stores, and notes."""
    published = [language_model_gammas(heads), (1 - 2.0 ** (-5.0 - np.arange(heads))).astype(np.float32)]
    default = settings.flag("use_default_gamma", False)
    named, other = published[::-1] if default else published
    name = name_of_all(stored, DECAY)
    if holds(stored, name, other, rtol=SAME_GAMMAS) and not holds(stored, name, named, rtol=SAME_GAMMAS):
        raise settings.wrong("use_default_gamma", default, f"{not default}, as the stored {name!r} says")
    gammas, notes = read_buffer(stored, name, named, rtol=SAME_GAMMAS)
    if not np.all((gammas > 0) & (gammas <= 1)):
        raise InputError(f"tensor {name!r} holds {gammas.tolist()}", "numbers in (0, 1]")
    return floats(np.log(gammas.astype(np.float64))), notes


SYNCDOTH_FIRST = FormatSpec(
    name="syncdoth-first",
    layout="syncdoth/RetNet's first layout",
    keys=KEYS,
    is_settings=is_settings,
    settings_words='"model_type": "retnet", qk_dim and hidden_size',
    marks=("model.blocks.0.msr.qkv.weight", EMBEDDING),
    names=tuple(NAMES),
    read=read,
    base="model.",
    outer_head={HEAD: HEAD},
)
