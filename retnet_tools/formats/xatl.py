"""syncdoth/RetNet-XATL: syncdoth's keys and tensor names over another model, and its lit-gpt training files.

Blocks may read one residual stream in parallel, projections may have biases, rotation covers the first part of each
head, scores are normalised only where `retnet_stability_update` says so, and `use_lm_decay` is a schedule of its own:
1 - exp(linspace(-5, -9)). Its buffers hold log2(gamma), and one angle a rotated pair. The training files keep q, k and
v of each head together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from retnet_tools.config import (
    Activation,
    BlockNorm,
    FeedForward,
    HeadNorm,
    NormKind,
    RetNetConfig,
    ScoreNormalization,
)
from retnet_tools.formats.buffers import holds, read_buffer
from retnet_tools.formats.inert import HUGGING_FACE, TRAINING
from retnet_tools.formats.mapping import check_tie
from retnet_tools.formats.schedules import (
    floats,
    linspace_frequencies,
    xatl_language_model_log2_decay,
    xatl_log2_decay,
)
from retnet_tools.formats.settings import Keys, Only, Settings, words
from retnet_tools.formats.spec import FormatSpec, Reading, Source, Transform
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.formats.transforms import head_part
from retnet_tools.formats.xatl_names import ANGLES, DECAYS, EMBEDDING, HEAD, QKV, hugging_face_names, lit_names

ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "gelu_new": "gelu_tanh", "swish": "silu", "relu": "relu"}
IGNORED_BY_KERNELS = ("use_lm_decay", "retnet_stability_update")
KERNELS_NOTE = "{}: read as its plain code computes; its fused kernels ignore that"
XATL_KEYS = words(
    """
    groupnorm_affine hybrid_attention_layers lm_head_bias parallel_residual retnet_bottleneck retnet_stability_update
    rotary_percentage shared_attention_norm
    """
)
KEYS = Keys(
    read=words(
        """
        activation_fn decoder_embed_dim decoder_ffn_embed_dim decoder_layers decoder_normalize_before
        decoder_retention_heads decoder_value_embed_dim deepnorm groupnorm_affine layernorm_embedding layernorm_eps
        lm_head_bias no_scale_embedding parallel_residual retnet_stability_update rotary_percentage
        shared_attention_norm subln tie_word_embeddings use_bias use_glu use_lm_decay use_rms_norm vocab_size
        """
    ),
    only={
        "retnet_bottleneck": Only((0,), "no bottleneck behind the head norm"),
        "hybrid_attention_layers": Only(([],), "retention in every layer"),
        "model_type": Only(("retnet",), "retnet"),
    },
    inert=HUGGING_FACE
    | TRAINING
    | words(
        """
        activation_dropout drop_path_rate dropout forward_impl recurrent_chunk_size use_ffn_rms_norm z_loss_coeff
        """
    ),
    aliases={
        "hidden_size": "decoder_embed_dim",
        "intermediate_size": "decoder_ffn_embed_dim",
        "num_attention_heads": "decoder_retention_heads",
        "num_hidden_layers": "decoder_layers",
    },
)


def is_settings(document: Mapping[str, Any]) -> bool:
    """syncdoth's sizes, and one of the keys that only this relative has."""
    sizes = "decoder_embed_dim" in document or "hidden_size" in document
    return document.get("model_type", "retnet") == "retnet" and sizes and bool(XATL_KEYS & document.keys())


def read(source: Source) -> Reading:
    """Resolve the configuration beside Hugging Face tensors.

    Raises:
        InputError: a kind of model that is not supported, buffers that are not what the configuration says.
    """
    if source.settings.flag("shared_attention_norm", False):
        # Without the second norm its Hugging Face code leaves the feed-forward network without any; its training code
        # shares the first. A folder may come from either.
        raise source.settings.wrong(
            "shared_attention_norm",
            True,
            "false in a Hugging Face folder, where its two codes disagree about it",
            "open the .pth file of the training",
        )
    config, notes = resolve(source.settings, source.stored)
    names = dict(hugging_face_names(glu=config.feed_forward.kind == "glu"))
    if config.tie_word_embeddings:
        names[HEAD] = None
        check_tie(source.stored, HEAD, EMBEDDING)
    return Reading(config, "syncdoth/RetNet-XATL", names, notes=notes)


def read_lit(source: Source) -> Reading:
    """Resolve the configuration beside tensors of its training code.

    Raises:
        InputError: as `read`.
    """
    config, notes = resolve(source.settings, source.stored)
    if config.value_dim != config.key_dim:
        raise source.settings.wrong("decoder_value_embed_dim", config.value_dim, "decoder_embed_dim in its .pth files")
    names = lit_names(glu=config.feed_forward.kind == "glu")
    transforms: dict[str, Transform] = {
        f"{name}.{part}": head_part(i, len(QKV), config.num_heads)
        for i, name in enumerate(QKV)
        for part in ("weight", "bias")
    }
    return Reading(config, "syncdoth/RetNet-XATL (lit)", names, transforms=transforms, notes=notes)


def resolve(settings: Settings, stored: StoredTensors) -> tuple[RetNetConfig, tuple[str, ...]]:
    """The configuration, with the defaults of RetNet-XATL filled in, and notes."""
    embed, heads = settings.size("decoder_embed_dim", 768), settings.size("decoder_retention_heads", 3)
    if embed % heads:
        raise settings.wrong("decoder_retention_heads", heads, f"a divisor of decoder_embed_dim = {embed}")
    head_k_dim, layers = embed // heads, settings.size("decoder_layers", 12)
    eps, bias = settings.number("layernorm_eps", 1e-6), settings.flag("use_bias", False)
    norm: NormKind = "rms" if settings.flag("use_rms_norm", True) else "layer"
    affine, stable = settings.flag("groupnorm_affine", False), settings.flag("retnet_stability_update", False)
    frequencies, decay, notes = _schedules(settings, stored, heads, head_k_dim)
    if ignored := [name for name in IGNORED_BY_KERNELS if settings.flag(name, False)]:
        notes = (*notes, KERNELS_NOTE.format(" and ".join(ignored)))
    deepnorm, subln, pre = settled_norms(settings)
    _check_residual(settings, pre)
    config = RetNetConfig(
        vocab_size=settings.size("vocab_size", 50257),
        hidden_size=embed,
        num_layers=layers,
        num_heads=heads,
        key_dim=embed,
        value_dim=settings.size("decoder_value_embed_dim", 1280),
        decay=decay,
        rotary_frequencies=frequencies,
        score_normalization=ScoreNormalization(head_k_dim**-0.5, stable, "sum_of_abs" if stable else "none"),
        head_norm=HeadNorm(norm, eps, "shared", bias=bias and norm == "layer") if affine else HeadNorm("rms", eps),
        block_norm=BlockNorm(norm, eps, bias=norm == "layer"),
        feed_forward=_feed_forward(settings, BlockNorm(norm, eps, bias=norm == "layer") if subln else None),
        norm_order="pre" if pre else "post",
        parallel_residual=settings.flag("parallel_residual", False),
        shared_block_norm=settings.flag("shared_attention_norm", False),
        residual_alpha=(2.0 * layers) ** 0.25 if deepnorm else 1.0,
        final_norm=pre,
        projection_bias=bias,
        embedding_scale=1.0 if settings.flag("no_scale_embedding", True) else math.sqrt(embed),
        embedding_norm=settings.flag("layernorm_embedding", False),
        tie_word_embeddings=settings.flag("tie_word_embeddings", False),
        head_bias=settings.flag("lm_head_bias", False),
    )
    return config, notes


def settled_norms(settings: Settings) -> tuple[bool, bool, bool]:
    """deepnorm, sub-norm, pre-norm. syncdoth's code turns two of them off by a third when a model is made, so that a
    stored configuration never holds what it would turn off.

    Raises:
        InputError: one that does.
    """
    deepnorm = settings.flag("deepnorm", False)
    subln = settings.flag("subln", not deepnorm)
    before = settings.flag("decoder_normalize_before", not deepnorm)
    for name, on in (("subln", subln), ("decoder_normalize_before", before)):
        if deepnorm and on:
            raise settings.wrong(name, True, "false, since deepnorm turns it off")
    if subln and not before:
        raise settings.wrong("decoder_normalize_before", False, "true, since subln turns it on")
    return deepnorm, subln, before


def _check_residual(settings: Settings, pre: bool) -> None:
    parallel = settings.flag("parallel_residual", False)
    if settings.flag("shared_attention_norm", False) and not parallel:
        raise settings.wrong("shared_attention_norm", True, "parallel_residual with it", "this is not supported")
    if parallel and not pre:
        raise settings.wrong("parallel_residual", True, "decoder_normalize_before with it", "this is not supported")


def _feed_forward(settings: Settings, sub_norm: BlockNorm | None) -> FeedForward:
    dim = settings.size("decoder_ffn_embed_dim", 1280)
    activation = settings.choice("activation_fn", ACTIVATIONS, "gelu")
    if settings.flag("use_glu", True):
        return FeedForward("glu", dim, activation)
    return FeedForward("plain", dim, activation, bias=True, norm=sub_norm)


def _schedules(
    settings: Settings, stored: StoredTensors, heads: int, head_k_dim: int
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[str, ...]]:
    """Rotary frequencies, 0 for the pairs that are not rotated, log(gamma), and notes."""
    part = settings.number("rotary_percentage", 1.0)
    rotated = int(head_k_dim * part)
    if rotated % 2 or rotated > head_k_dim:
        raise settings.wrong("rotary_percentage", part, f"an even number of the {head_k_dim} dimensions of a head")
    language = settings.flag("use_lm_decay", False)
    decays = [xatl_log2_decay(heads), xatl_language_model_log2_decay(heads)]
    named, other = decays[::-1] if language else decays
    if holds(stored, DECAYS, other) and not holds(stored, DECAYS, named):
        raise settings.wrong("use_lm_decay", language, f"{not language}, as the stored {DECAYS!r} says")
    angle, angle_notes = read_buffer(stored, ANGLES, linspace_frequencies(rotated))
    log2_gamma, decay_notes = read_buffer(stored, DECAYS, named)
    frequencies = floats(angle) + (0.0,) * ((head_k_dim - rotated) // 2)
    return frequencies, floats(log2_gamma.astype(np.float64) * math.log(2)), (*angle_notes, *decay_notes)


XATL = FormatSpec(
    name="xatl",
    layout="syncdoth/RetNet-XATL",
    keys=KEYS,
    is_settings=is_settings,
    settings_words='"model_type": "retnet" and rotary_percentage',
    marks=("model.layers.0.retention.q_proj.weight", EMBEDDING),
    names=(*hugging_face_names(glu=True), *hugging_face_names(glu=False)),
    read=read,
    base="model.",
    outer_head={HEAD: HEAD, "lm_head.bias": "lm_head.bias"},
)
XATL_LIT = FormatSpec(
    name="xatl-lit",
    layout="syncdoth/RetNet-XATL (lit)",
    keys=KEYS,
    is_settings=is_settings,
    settings_words='"model_type": "retnet" and rotary_percentage',
    marks=("transformer.h.0.attn.reten.weight", "transformer.wte.weight"),
    names=(*lit_names(glu=True), *lit_names(glu=False)),
    read=read_lit,
)
