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

from retnet_tools.config import Activation, BlockNorm, FeedForward, HeadNorm, RetNetConfig, ScoreNormalization
from retnet_tools.formats import schedules
from retnet_tools.formats import torchscale_tensors as tensors
from retnet_tools.formats.mapping import head_part
from retnet_tools.formats.settings import HUGGING_FACE, Keys, Only, Settings, words
from retnet_tools.formats.spec import FormatSpec, Reading, Source, in_layers, module_names

ANGLES, DECAYS = "model.retnet_rel_pos.angle", "model.retnet_rel_pos.decay"
QKV = tuple(f"retention.{name}_proj" for name in "qkv")
LIT_ROOT = {
    "transformer.wte": "embedding",
    "ln_e": "embedding_norm",
    "transformer.ln_f": "final_norm",
    "lm_head": "lm_head",
}
LIT_LAYER = {
    "norm_1": "retention_norm",
    "attn.reten": QKV,
    "attn.gate_proj": "retention.gate_proj",
    "attn.proj": "retention.out_proj",
    "attn.group_norm": "retention.head_norm",
    "norm_2": "ffn_norm",
}
LIT_FFN = {
    "glu": {"mlp.swiglu.w1": "ffn.gate_proj", "mlp.swiglu.w2": "ffn.up_proj", "mlp.swiglu.w3": "ffn.down_proj"},
    "plain": {"mlp.mlp.fc1": "ffn.up_proj", "mlp.mlp.fc2": "ffn.down_proj"},
}
LIT_NAMES = {
    kind: module_names(LIT_ROOT | in_layers("transformer.h", {**LIT_LAYER, **ffn})) for kind, ffn in LIT_FFN.items()
}
HEAD_NORM = module_names(in_layers("model.layers", {"retention.group_norm": "retention.head_norm"}))
NAMES = {kind: {**tensors.decoder_names(kind, "model.", "lm_head"), **HEAD_NORM} for kind in LIT_NAMES}
ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "gelu_new": "gelu_tanh", "swish": "silu", "relu": "relu"}
OWN_KEYS = words(
    "groupnorm_affine lm_head_bias parallel_residual retnet_stability_update rotary_percentage shared_attention_norm"
)
XATL_KEYS = OWN_KEYS | {"hybrid_attention_layers", "retnet_bottleneck"}
KEYS = Keys(
    read=tensors.KEYS | OWN_KEYS | words("tie_word_embeddings use_bias use_glu use_lm_decay use_rms_norm"),
    only={
        "retnet_bottleneck": Only((0,), "no bottleneck behind the head norm"),
        "hybrid_attention_layers": Only(([],), "retention in every layer"),
        "model_type": Only(("retnet",), "retnet"),
    },
    inert=HUGGING_FACE | words("forward_impl recurrent_chunk_size use_ffn_rms_norm"),
    aliases={
        "hidden_size": "decoder_embed_dim",
        "intermediate_size": "decoder_ffn_embed_dim",
        "num_attention_heads": "decoder_retention_heads",
        "num_hidden_layers": "decoder_layers",
    },
)


def _read(source: Source) -> Reading:
    if source.settings.flag("shared_attention_norm", False):
        # Without the second norm its Hugging Face code leaves the feed-forward network without any; its training code
        # shares the first. A folder may come from either.
        expected = "false in a Hugging Face folder, where its two codes disagree about it"
        raise source.settings.wrong("shared_attention_norm", True, expected, "open the .pth file of the training")
    config = resolve(source)
    return Reading(config, "syncdoth/RetNet-XATL", NAMES[config.feed_forward.kind])


def _read_lit(source: Source) -> Reading:
    config = resolve(source)
    if config.value_dim != config.key_dim:
        raise source.settings.wrong("decoder_value_embed_dim", config.value_dim, "decoder_embed_dim in its .pth files")
    transforms = {
        f"layers.{{i}}.{name}.{part}": head_part(i, len(QKV), config.num_heads)
        for i, name in enumerate(QKV)
        for part in ("weight", "bias")
    }
    return Reading(config, "syncdoth/RetNet-XATL (lit)", LIT_NAMES[config.feed_forward.kind], transforms=transforms)


def resolve(source: Source) -> RetNetConfig:
    """The configuration, with the defaults of RetNet-XATL filled in."""
    settings = source.settings
    embed, heads = settings.size("decoder_embed_dim", 768), settings.size("decoder_retention_heads", 3)
    if embed % heads:
        raise settings.wrong("decoder_retention_heads", heads, f"a divisor of decoder_embed_dim = {embed}")
    head_k_dim, layers = embed // heads, settings.size("decoder_layers", 12)
    eps, bias = settings.number("layernorm_eps", 1e-6), settings.flag("use_bias", False)
    block_norm = BlockNorm("rms", eps) if settings.flag("use_rms_norm", True) else BlockNorm("layer", eps, bias=True)
    shared_norm = HeadNorm(block_norm.kind, eps, "shared", bias=bias and block_norm.bias)
    affine, stable = settings.flag("groupnorm_affine", False), settings.flag("retnet_stability_update", False)
    decay, frequencies = _schedules(source, heads, head_k_dim)
    if ignored := [name for name in ("use_lm_decay", "retnet_stability_update") if settings.flag(name, False)]:
        source.notes.append(f"{' and '.join(ignored)}: read as its plain code computes; its fused kernels ignore that")
    deepnorm, subln, pre = settled_norms(settings)
    parallel, shared = settings.flag("parallel_residual", False), settings.flag("shared_attention_norm", False)
    if shared and not parallel:
        raise settings.wrong("shared_attention_norm", True, "parallel_residual with it", "this is not supported")
    if parallel and not pre:
        raise settings.wrong("parallel_residual", True, "decoder_normalize_before with it", "this is not supported")
    return RetNetConfig(
        **tensors.decoder_fields(settings, embed, heads, layers, pre=pre, deepnorm=deepnorm),
        vocab_size=settings.size("vocab_size", 50257),
        value_dim=settings.size("decoder_value_embed_dim", 1280),
        decay=decay,
        rotary_frequencies=frequencies,
        score_normalization=ScoreNormalization(head_k_dim**-0.5, stable, "sum_of_abs" if stable else "none"),
        head_norm=shared_norm if affine else HeadNorm("rms", eps),
        block_norm=block_norm,
        feed_forward=_feed_forward(settings, block_norm if subln else None),
        parallel_residual=parallel,
        shared_block_norm=shared,
        projection_bias=bias,
        tie_word_embeddings=settings.flag("tie_word_embeddings", False),
        head_bias=settings.flag("lm_head_bias", False),
    )


def settled_norms(settings: Settings) -> tuple[bool, bool, bool]:
    """deepnorm, sub-norm, pre-norm. syncdoth's code turns two of them off by a third when a model is made, so that a
    stored configuration never holds what it would turn off; one that does is refused."""
    deepnorm = settings.flag("deepnorm", False)
    subln = settings.flag("subln", not deepnorm)
    before = settings.flag("decoder_normalize_before", not deepnorm)
    for name, on in (("subln", subln), ("decoder_normalize_before", before)):
        if deepnorm and on:
            raise settings.wrong(name, True, "false, since deepnorm turns it off")
    if subln and not before:
        raise settings.wrong("decoder_normalize_before", False, "true, since subln turns it on")
    return deepnorm, subln, before


def _feed_forward(settings: Settings, sub_norm: BlockNorm | None) -> FeedForward:
    dim = settings.size("decoder_ffn_embed_dim", 1280)
    activation = settings.choice("activation_fn", ACTIVATIONS, "gelu")
    if settings.flag("use_glu", True):
        return FeedForward("glu", dim, activation)
    return FeedForward("plain", dim, activation, bias=True, norm=sub_norm)


def _schedules(source: Source, heads: int, head_k_dim: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """log(gamma), and rotary frequencies, 0 for the pairs that are not rotated."""
    settings = source.settings
    part, language_model = settings.number("rotary_percentage", 1.0), settings.flag("use_lm_decay", False)
    rotated = int(head_k_dim * part)
    if rotated % 2 or rotated > head_k_dim:
        raise settings.wrong("rotary_percentage", part, f"an even number of the {head_k_dim} dimensions of a head")
    angles = schedules.read_buffer(source, ANGLES, schedules.linspace_frequencies(rotated))
    frequencies = schedules.floats(angles) + (0.0,) * ((head_k_dim - rotated) // 2)
    gammas = schedules.paper_gammas(heads), schedules.language_model_gammas(heads, -5.0, -9.0)
    decays = [schedules.log_float32(schedule, base=2) for schedule in gammas]
    refusal = settings.wrong("use_lm_decay", language_model, f"{not language_model}, as the stored {DECAYS!r} says")
    log2_gamma = schedules.read_named(source, DECAYS, decays[language_model], decays[not language_model], refusal)
    return schedules.floats(log2_gamma.astype(np.float64) * math.log(2)), frequencies


def _is_settings(document: Mapping[str, Any]) -> bool:
    sizes = "decoder_embed_dim" in document or "hidden_size" in document
    return document.get("model_type", "retnet") == "retnet" and sizes and bool(XATL_KEYS & document.keys())


XATL = FormatSpec(
    name="xatl",
    layout="syncdoth/RetNet-XATL",
    keys=KEYS,
    is_settings=_is_settings,
    settings_words='"model_type": "retnet" and rotary_percentage',
    marks=("model.layers.0.retention.q_proj.weight", "model.embed_tokens.weight"),
    names=(*NAMES["glu"], *NAMES["plain"]),
    read=_read,
    base="model.",
    outer_head={name: name for name in ("lm_head.weight", "lm_head.bias")},
)
XATL_LIT = FormatSpec(
    name="xatl-lit",
    layout="syncdoth/RetNet-XATL (lit)",
    keys=KEYS,
    is_settings=_is_settings,
    settings_words='"model_type": "retnet" and rotary_percentage',
    marks=("transformer.h.0.attn.reten.weight", "transformer.wte.weight"),
    names=(*LIT_NAMES["glu"], *LIT_NAMES["plain"]),
    read=_read_lit,
)
