"""syncdoth/RetNet: a Hugging Face folder with torchscale's tensor names under `model.`.

Differs from torchscale in its configuration alone: a second decay schedule, and a feed-forward network that may be
plain, with biases and a norm of its own. Its revision of 2 October 2023 (`value_factor`) is torchscale's older model,
with one epsilon for all norms. Until January 2024 its parallel form clamped |sum| of the scores, since then the sum of
||; but for that first revision nothing in the files tells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from retnet_tools.config import (
    Activation,
    BlockNorm,
    FeedForward,
    HeadNorm,
    RetNetConfig,
    ScoreClamp,
    ScoreNormalization,
)
from retnet_tools.formats import syncdoth_writing
from retnet_tools.formats.inert import HUGGING_FACE, TRAINING
from retnet_tools.formats.mapping import check_tie, is_tied
from retnet_tools.formats.schedules import language_model_log_decay, paper_log_decay
from retnet_tools.formats.settings import Keys, Settings, words
from retnet_tools.formats.spec import FormatSpec, NameTable, Reading, Source
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.formats.torchscale import OWN_KEYS as TORCHSCALE_KEYS
from retnet_tools.formats.torchscale import SYNCDOTH_KEYS
from retnet_tools.formats.torchscale_buffers import Schedules, read_schedules
from retnet_tools.formats.torchscale_releases import HEAD as TORCHSCALE_HEAD
from retnet_tools.formats.torchscale_releases import OLD_NAMES
from retnet_tools.formats.xatl import XATL_KEYS, settled_norms

PREFIX = "model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "swish": "silu", "relu": "relu"}
NAMES: NameTable = {
    EMBEDDING: "embedding.weight",
    HEAD: "lm_head.weight",
    "model.layernorm_embedding.weight": "embedding_norm.weight",
    "model.layers.{i}.retention_layer_norm.weight": "layers.{i}.retention_norm.weight",
    "model.layers.{i}.retention.q_proj.weight": "layers.{i}.retention.q_proj.weight",
    "model.layers.{i}.retention.k_proj.weight": "layers.{i}.retention.k_proj.weight",
    "model.layers.{i}.retention.v_proj.weight": "layers.{i}.retention.v_proj.weight",
    "model.layers.{i}.retention.g_proj.weight": "layers.{i}.retention.gate_proj.weight",
    "model.layers.{i}.retention.out_proj.weight": "layers.{i}.retention.out_proj.weight",
    "model.layers.{i}.final_layer_norm.weight": "layers.{i}.ffn_norm.weight",
    "model.layers.{i}.ffn.fc2.weight": "layers.{i}.ffn.down_proj.weight",
    "model.layer_norm.weight": "final_norm.weight",
    "model.retnet_rel_pos.angle": None,
    "model.retnet_rel_pos.decay": None,
}
GLU_NAMES: NameTable = {
    "model.layers.{i}.ffn.fc1.weight": "layers.{i}.ffn.gate_proj.weight",
    "model.layers.{i}.ffn.gate.weight": "layers.{i}.ffn.up_proj.weight",
}
PLAIN_NAMES: NameTable = {
    "model.layers.{i}.ffn.fc1.weight": "layers.{i}.ffn.up_proj.weight",
    "model.layers.{i}.ffn.fc1.bias": "layers.{i}.ffn.up_proj.bias",
    "model.layers.{i}.ffn.fc2.bias": "layers.{i}.ffn.down_proj.bias",
    "model.layers.{i}.ffn.ffn_layernorm.weight": "layers.{i}.ffn.norm.weight",
    "model.layers.{i}.ffn.ffn_layernorm.bias": "layers.{i}.ffn.norm.bias",
}


REVISION_NAMES: NameTable = {
    HEAD if name == TORCHSCALE_HEAD else PREFIX + name: canonical for name, canonical in OLD_NAMES.items()
}
CLAMPS: dict[str, ScoreClamp] = {"abs_of_sum": "abs_of_sum", "sum_of_abs": "sum_of_abs"}
KEYS = Keys(
    read=words(
        """
        activation_fn decoder_embed_dim decoder_ffn_embed_dim decoder_layers decoder_normalize_before
        decoder_retention_heads decoder_value_embed_dim deepnorm layernorm_embedding layernorm_eps no_scale_embedding
        score_clamp subln tie_word_embeddings use_ffn_rms_norm use_glu use_lm_decay value_factor vocab_size
        """
    ),
    inert=HUGGING_FACE
    | TRAINING
    | words("activation_dropout drop_path_rate dropout forward_impl recurrent_chunk_size z_loss_coeff"),
)


def is_settings(document: Mapping[str, Any]) -> bool:
    """Its sizes by name, and none of the keys of its relatives."""
    relatives = (TORCHSCALE_KEYS | XATL_KEYS) & document.keys()
    named = document.get("model_type", "retnet") == "retnet"
    own = "model_type" in document or bool(SYNCDOTH_KEYS & document.keys())
    return named and own and "decoder_embed_dim" in document and not relatives


def read(source: Source) -> Reading:
    """Resolve the configuration of syncdoth/RetNet.

    Raises:
        InputError: sizes that do not divide, settings that contradict each other or the buffers, a tied head that
            differs from the embedding.
    """
    settings, stored = source.settings, source.stored
    embed, heads = settings.size("decoder_embed_dim", 768), _heads(settings)
    if embed % heads:
        raise settings.wrong("decoder_retention_heads", heads, f"a divisor of decoder_embed_dim = {embed}")
    log_decay = language_model_log_decay if settings.flag("use_lm_decay", False) else paper_log_decay
    schedules = read_schedules(stored, PREFIX, heads, embed // heads, log_decay)
    revision = settings.has("value_factor")
    config = resolve(settings, schedules, tied=_is_tied(settings, stored))
    names = dict(REVISION_NAMES) if revision else {**NAMES, **_ffn_names(config)}
    if config.tie_word_embeddings:
        names[HEAD] = None
        check_tie(stored, HEAD, EMBEDDING)
    notes = list(schedules.notes)
    if settings.flag("use_glu", True) and settings.flag("use_ffn_rms_norm", False) and not revision:
        notes.append("use_ffn_rms_norm does nothing with use_glu")
    version = "syncdoth/RetNet (2 October 2023)" if revision else "syncdoth/RetNet"
    assumed = not revision and not settings.has("score_clamp")
    return Reading(config, version, names, notes=tuple(notes), assumed_clamp=assumed)


def _ffn_names(config: RetNetConfig) -> NameTable:
    return GLU_NAMES if config.feed_forward.kind == "glu" else PLAIN_NAMES


def resolve(settings: Settings, schedules: Schedules, *, tied: bool = False) -> RetNetConfig:
    """The configuration, with syncdoth's defaults filled in and its flags settled as its code settles them."""
    revision = settings.has("value_factor")
    embed, layers = settings.size("decoder_embed_dim", 768), settings.size("decoder_layers", 12)
    heads = _heads(settings)
    eps = settings.number("layernorm_eps", 1e-5 if revision else 1e-6)
    deepnorm, subln, pre = settled_norms(settings)
    clamp = settings.choice("score_clamp", CLAMPS, "abs_of_sum" if revision else "sum_of_abs")
    return RetNetConfig(
        vocab_size=settings.size("vocab_size", 50257),
        hidden_size=embed,
        num_layers=layers,
        num_heads=heads,
        key_dim=embed,
        value_dim=_value_dim(settings, embed),
        decay=schedules.decay,
        rotary_frequencies=schedules.rotary_frequencies,
        score_normalization=ScoreNormalization((embed // heads) ** -0.5, by_decay=True, clamp=clamp),
        head_norm=HeadNorm("layer" if revision else "rms", eps),
        block_norm=BlockNorm("layer" if revision else "rms", eps, bias=revision),
        feed_forward=_feed_forward(settings, subln, eps),
        norm_order="pre" if pre else "post",
        residual_alpha=(2.0 * layers) ** 0.25 if deepnorm else 1.0,
        final_norm=pre,
        projection_bias=revision,
        embedding_scale=1.0 if settings.flag("no_scale_embedding", True) else math.sqrt(embed),
        embedding_norm=settings.flag("layernorm_embedding", False),
        tie_word_embeddings=tied,
    )


def _heads(settings: Settings) -> int:
    return settings.size("decoder_retention_heads", 2 if settings.has("value_factor") else 3)


def _is_tied(settings: Settings, stored: StoredTensors) -> bool:
    """`tie_word_embeddings`, false by default since 3 October 2023. Before, transformers' default held, and the tensors
    tell."""
    default = settings.has("value_factor") and is_tied(stored, HEAD, EMBEDDING)
    return settings.flag("tie_word_embeddings", default)


def _value_dim(settings: Settings, embed: int) -> int:
    if not settings.has("value_factor"):
        return settings.size("decoder_value_embed_dim", 1280)
    size = embed * settings.count("value_factor")
    if (stated := settings.count("decoder_value_embed_dim", size)) != size:
        raise settings.wrong("decoder_value_embed_dim", stated, f"value_factor times {embed} = {size}")
    return size


def _feed_forward(settings: Settings, subln: bool, eps: float) -> FeedForward:
    revision = settings.has("value_factor")
    dim = settings.size("decoder_ffn_embed_dim", 1536 if revision else 1280)
    activation = settings.choice("activation_fn", ACTIVATIONS, "gelu")
    if settings.flag("use_glu", not revision):
        if revision:
            raise settings.wrong("use_glu", True, "no gate in a configuration with value_factor")
        return FeedForward("glu", dim, activation)
    rms = settings.flag("use_ffn_rms_norm", False)
    norm = BlockNorm("rms" if rms else "layer", eps, bias=not rms)
    return FeedForward("plain", dim, activation, bias=True, norm=norm if subln else None)


SYNCDOTH = FormatSpec(
    name="syncdoth",
    layout="syncdoth/RetNet",
    keys=KEYS,
    is_settings=is_settings,
    settings_words='"model_type": "retnet" and decoder_embed_dim',
    marks=("model.layers.0.retention.q_proj.weight", EMBEDDING),
    names=tuple(dict.fromkeys((*NAMES, *GLU_NAMES, *PLAIN_NAMES, *REVISION_NAMES))),
    read=read,
    base=PREFIX,
    outer_head={HEAD: HEAD},
    write=lambda config, assumed: syncdoth_writing.write(config, assumed, NAMES, GLU_NAMES, PLAIN_NAMES),
)
