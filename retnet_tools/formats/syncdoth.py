"""syncdoth/RetNet: a Hugging Face folder with torchscale's tensor names under `model.`.

Differs from torchscale in its configuration alone: a second decay schedule, and a feed-forward network that may be
plain, with biases and a norm of its own. It clamps scores as torchscale does since late 2023.
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
from retnet_tools.errors import InputError
from retnet_tools.formats import syncdoth_writing
from retnet_tools.formats.files import CheckpointFiles
from retnet_tools.formats.schedules import language_model_log_decay, paper_log_decay
from retnet_tools.formats.settings import Settings
from retnet_tools.formats.spec import FormatSpec, NameTable, Reading, check_tie
from retnet_tools.formats.torchscale_buffers import Schedules, read_schedules

ORIGIN = "syncdoth"
PREFIX = "model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "swish": "silu", "relu": "relu"}
SCORE_CLAMPS: dict[str, ScoreClamp] = {"abs_of_sum": "abs_of_sum", "sum_of_abs": "sum_of_abs"}
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


def _is_settings(document: Mapping[str, Any]) -> bool:
    return document.get("model_type") == "retnet" and "decoder_embed_dim" in document


def detect(files: CheckpointFiles) -> bool:
    """A configuration of model_type retnet that calls its size `decoder_embed_dim`."""
    return any(_is_settings(document) for document in files.configs.values())


def read(files: CheckpointFiles) -> Reading:
    """Resolve the configuration of syncdoth/RetNet.

    Raises:
        InputError: no configuration, sizes that do not divide, a tied head that differs from the embedding.
    """
    found = [(path, Settings(ORIGIN, document)) for path, document in files.configs.items() if _is_settings(document)]
    if not found:
        raise InputError(
            f"no {ORIGIN} configuration in {files.folder}",
            'a config.json with "model_type": "retnet" and decoder_embed_dim',
        )
    path, settings = found[0]
    stored = files.tensors
    embed, heads = settings.count("decoder_embed_dim", 768), settings.count("decoder_retention_heads", 3)
    if embed % heads:
        raise InputError(
            f"the {ORIGIN} configuration has decoder_retention_heads = {heads}",
            f"a divisor of decoder_embed_dim = {embed}",
        )
    log_decay = language_model_log_decay if settings.flag("use_lm_decay", False) else paper_log_decay
    schedules = read_schedules(stored, PREFIX, heads, embed // heads, log_decay)
    config = resolve(settings, schedules)
    names = {**NAMES, **(GLU_NAMES if config.feed_forward.kind == "glu" else PLAIN_NAMES)}
    if config.tie_word_embeddings:
        names[HEAD] = None
        check_tie(stored, HEAD, EMBEDDING)
    return Reading(config, "syncdoth/RetNet", names, config_files=(path,), notes=schedules.notes)


def resolve(settings: Settings, schedules: Schedules) -> RetNetConfig:
    """The configuration, with syncdoth's defaults filled in and its flags settled as its code settles them."""
    embed, layers = settings.count("decoder_embed_dim", 768), settings.count("decoder_layers", 12)
    heads, eps = settings.count("decoder_retention_heads", 3), settings.number("layernorm_eps", 1e-6)
    deepnorm = settings.flag("deepnorm", False)
    subln = settings.flag("subln", True) and not deepnorm
    clamp = settings.choice("score_clamp", SCORE_CLAMPS, "sum_of_abs")
    pre = subln or (settings.flag("decoder_normalize_before", True) and not deepnorm)
    return RetNetConfig(
        vocab_size=settings.count("vocab_size", 50257),
        hidden_size=embed,
        num_layers=layers,
        num_heads=heads,
        key_dim=embed,
        value_dim=settings.count("decoder_value_embed_dim", 1280),
        decay=schedules.decay,
        rotary_frequencies=schedules.rotary_frequencies,
        score_normalization=ScoreNormalization((embed // heads) ** -0.5, by_decay=True, clamp=clamp),
        head_norm=HeadNorm("rms", eps),
        block_norm=BlockNorm("rms", eps),
        feed_forward=_feed_forward(settings, subln, eps),
        norm_order="pre" if pre else "post",
        residual_alpha=(2.0 * layers) ** 0.25 if deepnorm else 1.0,
        final_norm=pre,
        embedding_scale=1.0 if settings.flag("no_scale_embedding", True) else math.sqrt(embed),
        embedding_norm=settings.flag("layernorm_embedding", False),
        tie_word_embeddings=settings.flag("tie_word_embeddings", False),
    )


def _feed_forward(settings: Settings, subln: bool, eps: float) -> FeedForward:
    dim = settings.count("decoder_ffn_embed_dim", 1280)
    activation = settings.choice("activation_fn", ACTIVATIONS, "gelu")
    if settings.flag("use_glu", True):
        return FeedForward("glu", dim, activation)
    rms = settings.flag("use_ffn_rms_norm", False)
    norm = BlockNorm("rms" if rms else "layer", eps, bias=not rms)
    return FeedForward("plain", dim, activation, bias=True, norm=norm if subln else None)


SYNCDOTH = FormatSpec(
    name="syncdoth",
    looked_for='a config.json with "model_type": "retnet" and decoder_embed_dim',
    detect=detect,
    read=read,
    write=lambda config: syncdoth_writing.write(config, NAMES, GLU_NAMES, PLAIN_NAMES),
)
