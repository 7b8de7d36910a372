"""syncdoth/RetNet: a Hugging Face folder with torchscale's tensor names under `model.`.

Differs from torchscale in its configuration alone: a second decay schedule, and a feed-forward network that may be
plain, with biases and a norm of its own. Its revision of 2 October 2023 (`value_factor`) is torchscale's older model,
with one epsilon for all norms. Until January 2024 its parallel form clamped |sum| of the scores, since then the sum of
||; but for that first revision nothing in the files tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from retnet_tools.config import BlockNorm, FeedForward, HeadNorm, RetNetConfig, ScoreClamp, ScoreNormalization
from retnet_tools.formats import torchscale_tensors as tensors
from retnet_tools.formats.mapping import is_tied
from retnet_tools.formats.settings import HUGGING_FACE, Keys, Settings, words
from retnet_tools.formats.spec import FormatSpec, Reading, Source, Writing
from retnet_tools.formats.torchscale import OWN_KEYS as TORCHSCALE_KEYS
from retnet_tools.formats.torchscale import SYNCDOTH_KEYS
from retnet_tools.formats.xatl import XATL_KEYS, settled_norms

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NAMES = {kind: dict(tensors.decoder_names(kind, "model.", "lm_head")) for kind in ("glu", "plain")}
for name in ("fc1.bias", "fc2.bias", "ffn_layernorm.weight", "ffn_layernorm.bias"):  # the order that is written
    NAMES["plain"][f"model.layers.{{i}}.ffn.{name}"] = NAMES["plain"].pop(f"model.layers.{{i}}.ffn.{name}")
CLAMPS: dict[str, ScoreClamp] = {"abs_of_sum": "abs_of_sum", "sum_of_abs": "sum_of_abs"}
KEYS = Keys(
    read=tensors.KEYS | words("score_clamp tie_word_embeddings use_ffn_rms_norm use_glu use_lm_decay value_factor"),
    inert=HUGGING_FACE | words("forward_impl recurrent_chunk_size"),
)


def _read(source: Source) -> Reading:
    settings, revision = source.settings, source.settings.has("value_factor")
    config = resolve(source, tied_by_default=revision and is_tied(source.stored, HEAD, EMBEDDING))
    if settings.flag("use_glu", True) and settings.flag("use_ffn_rms_norm", False) and not revision:
        source.notes.append("use_ffn_rms_norm does nothing with use_glu")
    assumed = not revision and not settings.has("score_clamp")
    version = "syncdoth/RetNet (2 October 2023)" if revision else "syncdoth/RetNet"
    return Reading(config, version, NAMES[config.feed_forward.kind], assumed_clamp=assumed)


def resolve(source: Source, *, tied_by_default: bool = False) -> RetNetConfig:
    """The configuration, with syncdoth's defaults filled in and its flags settled as its code settles them.

    Args:
        tied_by_default: False since 3 October 2023. Before, transformers' default held, and the tensors tell.

    Raises:
        InputError: sizes that do not divide, settings that contradict each other or the buffers.
    """
    settings, revision = source.settings, source.settings.has("value_factor")
    embed = settings.size("decoder_embed_dim", 768)
    heads = settings.size("decoder_retention_heads", 2 if revision else 3)
    if embed % heads:
        raise settings.wrong("decoder_retention_heads", heads, f"a divisor of decoder_embed_dim = {embed}")
    language_model = settings.flag("use_lm_decay", False)
    decay, frequencies = tensors.read_buffers(source, "model.", heads, embed // heads, language_model=language_model)
    layers, eps = settings.size("decoder_layers", 12), settings.number("layernorm_eps", 1e-5 if revision else 1e-6)
    deepnorm, subln, pre = settled_norms(settings)
    clamp = settings.choice("score_clamp", CLAMPS, "abs_of_sum" if revision else "sum_of_abs")
    return RetNetConfig(
        **tensors.decoder_fields(settings, embed, heads, layers, pre=pre, deepnorm=deepnorm),
        vocab_size=settings.size("vocab_size", 50257),
        value_dim=_value_dim(settings, embed),
        decay=decay,
        rotary_frequencies=frequencies,
        score_normalization=ScoreNormalization((embed // heads) ** -0.5, by_decay=True, clamp=clamp),
        head_norm=HeadNorm("layer" if revision else "rms", eps),
        block_norm=BlockNorm("layer" if revision else "rms", eps, bias=revision),
        feed_forward=_feed_forward(settings, subln, eps),
        projection_bias=revision,
        tie_word_embeddings=settings.flag("tie_word_embeddings", tied_by_default),
    )


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
    activation = settings.choice("activation_fn", tensors.ACTIVATIONS, "gelu")
    if settings.flag("use_glu", not revision):
        if revision:
            raise settings.wrong("use_glu", True, "no gate in a configuration with value_factor")
        return FeedForward("glu", dim, activation)
    rms = settings.flag("use_ffn_rms_norm", False)
    norm = BlockNorm("rms" if rms else "layer", eps, bias=not rms)
    return FeedForward("plain", dim, activation, bias=True, norm=norm if subln else None)


def _write(config: RetNetConfig, assumed_clamp: bool) -> Writing:
    ffn, clamp, deepnorm = config.feed_forward, config.score_normalization.clamp, config.residual_alpha != 1.0
    settings = {
        "model_type": "retnet",
        "architectures": ["RetNetForCausalLM"],
        "vocab_size": config.vocab_size,
        **tensors.written_sizes(config),
        "use_glu": ffn.kind == "glu",
        "use_ffn_rms_norm": ffn.norm is not None and ffn.norm.kind == "rms",
        "use_lm_decay": bool(np.allclose(config.decay, tensors.language_model_log_decay(config.num_heads), atol=0)),
        "deepnorm": deepnorm,
        "subln": config.norm_order == "pre" and not deepnorm and (ffn.kind == "glu" or ffn.norm is not None),
        "layernorm_embedding": config.embedding_norm,
        "layernorm_eps": config.block_norm.eps,
        "no_scale_embedding": config.embedding_scale == 1.0,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    # Not a key of syncdoth's: its releases differ in the clamp and its own files do not tell.
    told = {} if clamp == "none" or assumed_clamp else {"score_clamp": clamp}
    return Writing(settings | told, NAMES[ffn.kind], buffers=tensors.written_buffers(config, "model."))


def _is_settings(document: Mapping[str, Any]) -> bool:
    relatives = (TORCHSCALE_KEYS | XATL_KEYS) & document.keys()
    named = document.get("model_type", "retnet") == "retnet"
    own = "model_type" in document or bool(SYNCDOTH_KEYS & document.keys())
    return named and own and "decoder_embed_dim" in document and not relatives


SYNCDOTH = FormatSpec(
    name="syncdoth",
    layout="syncdoth/RetNet",
    keys=KEYS,
    is_settings=_is_settings,
    settings_words='"model_type": "retnet" and decoder_embed_dim',
    marks=("model.layers.0.retention.q_proj.weight", EMBEDDING),
    names=(*NAMES["glu"], *NAMES["plain"]),
    read=_read,
    base="model.",
    outer_head={HEAD: HEAD},
    write=_write,
)
