"""syncdoth/RetNet's first layout, until October 2023: `RetNetModelWithLMHead`, with q, k and v in one matrix.

Rotation and xPos run over all of `qk_dim` before it is cut into heads, so each head has frequencies and a decay per key
dimension of its own: pair j of all K_total/2 turns by 10000^(-j / (K_total/2)) and decays by z_j^(1/512), z_j =
(2j + 0.4 K_total) / 1.4 K_total. Its state is ours divided by z^(n/512).
"""

from __future__ import annotations

import numpy as np

from retnet_tools.config import BlockNorm, FeedForward, HeadNorm, RetNetConfig, ScoreNormalization
from retnet_tools.errors import InputError
from retnet_tools.formats import schedules
from retnet_tools.formats.mapping import is_tied, row_range
from retnet_tools.formats.settings import HUGGING_FACE, Keys, words
from retnet_tools.formats.spec import FormatSpec, Reading, Source, in_layers, module_names

EMBEDDING, HEAD = "model.embedding.weight", "lm_head.weight"
DECAY, SCALE = "model.blocks.{i}.msr.decay", "model.blocks.{i}.msr.xpos.scale"
EPS = 1e-5
SAME_GAMMAS = 1e-6
QKV = tuple(f"retention.{name}_proj" for name in "qkv")
LAYER = {
    "msr.qkv": QKV,
    "msr.gated": "retention.gate_proj",
    "msr.proj": "retention.out_proj",
    "ffn.0": "ffn.up_proj",
    "ffn.2": "ffn.down_proj",
    "ln1": "retention_norm",
    "ln2": "ffn_norm",
}
MODULES = {"model.embedding": "embedding", "lm_head": "lm_head", **in_layers("model.blocks", LAYER)}
NAMES = {**module_names(MODULES), DECAY: None, SCALE: None}
KEYS = Keys(
    read=words(
        """
        ffn_proj_size hidden_size num_heads num_layers qk_dim tie_word_embeddings use_bias_in_mlp use_bias_in_msr
        use_bias_in_msr_out use_default_gamma v_dim vocab_size
        """
    ),
    inert=HUGGING_FACE | words("chunk_size forward_impl"),
)


def _read(source: Source) -> Reading:
    config, flag = resolve(source), source.settings.flag
    sizes = (config.key_dim, config.key_dim, config.value_dim)
    transforms = {
        f"layers.{{i}}.{name}.{part}": row_range(sum(sizes[:i]), sizes[i], sum(sizes))
        for i, name in enumerate(QKV)
        for part in ("weight", "bias")
    }
    # The biases that this model does not have, where others of its projections have one.
    zero = ["retention.gate_proj"]
    zero += [] if flag("use_bias_in_msr", False) else QKV
    zero += [] if flag("use_bias_in_msr_out", False) else ["retention.out_proj"]
    zeros = frozenset(f"layers.{{i}}.{name}.bias" for name in zero if config.projection_bias)
    return Reading(config, "syncdoth/RetNet (until October 2023)", NAMES, transforms=transforms, zeros=zeros)


def resolve(source: Source) -> RetNetConfig:
    """The configuration, with the defaults of its classes filled in.

    Raises:
        InputError: sizes that do not divide, layers of different decay, another decay than the configuration names.
    """
    settings, stored = source.settings, source.stored
    heads, key_dim = settings.size("num_heads", 8), settings.size("qk_dim", 2048)
    value_dim, ffn_dim = settings.size("v_dim", 4096), settings.size("ffn_proj_size", 4096)
    for name, size in (("qk_dim", key_dim), ("v_dim", value_dim)):
        if size % heads:
            raise settings.wrong(name, size, f"a multiple of num_heads = {heads}")
    # Made at each call, in the dtype that torch defaults to.
    frequencies = 10000.0 ** -(np.arange(key_dim // 2) / (key_dim // 2))
    return RetNetConfig(
        vocab_size=settings.size("vocab_size", 50257),
        hidden_size=settings.size("hidden_size", 2048),
        num_layers=settings.size("num_layers", 24),
        num_heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        decay=_decay(source, heads),
        key_decay=schedules.read_xpos(source, SCALE, key_dim),
        rotary_frequencies=schedules.floats(frequencies),
        score_normalization=ScoreNormalization((key_dim // heads) ** -0.5, by_decay=False, clamp="none"),
        head_norm=HeadNorm("layer", EPS),
        block_norm=BlockNorm("layer", EPS, bias=True),
        feed_forward=FeedForward("plain", ffn_dim, "gelu", bias=settings.flag("use_bias_in_mlp", True)),
        final_norm=False,
        projection_bias=settings.flag("use_bias_in_msr", False) or settings.flag("use_bias_in_msr_out", False),
        tie_word_embeddings=settings.flag("tie_word_embeddings", is_tied(stored, HEAD, EMBEDDING)),
    )


def _decay(source: Source, heads: int) -> tuple[float, ...]:
    """log(gamma) of the gammas that every layer stores."""
    gammas = schedules.language_model_gammas(heads), schedules.paper_gammas(heads)
    paper, name = source.settings.flag("use_default_gamma", False), schedules.name_of_all(source.stored, DECAY)
    refusal = source.settings.wrong("use_default_gamma", paper, f"{not paper}, as the stored {name!r} says")
    gamma = schedules.read_named(source, name, gammas[paper], gammas[not paper], refusal, rtol=SAME_GAMMAS)
    if not np.all((gamma > 0) & (gamma <= 1)):
        raise InputError(f"tensor {name!r} holds {gamma.tolist()}", "numbers in (0, 1]")
    return schedules.floats(np.log(gamma.astype(np.float64)))


SYNCDOTH_FIRST = FormatSpec(
    name="syncdoth-first",
    layout="syncdoth/RetNet's first layout",
    keys=KEYS,
    is_settings=lambda document: (
        document.get("model_type", "retnet") == "retnet" and {"qk_dim", "hidden_size"} <= document.keys()
    ),
    settings_words='"model_type": "retnet", qk_dim and hidden_size',
    marks=("model.blocks.0.msr.qkv.weight", EMBEDDING),
    names=NAMES,
    read=_read,
    base="model.",
    outer_head={HEAD: HEAD},
)
