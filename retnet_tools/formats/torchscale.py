"""microsoft/torchscale: fairseq's `.pt`, and a state dict with its `RetNetConfig` as JSON beside, in any wrapper.

Several releases store different tensors (`torchscale_releases`); the tensors tell which one wrote a file.
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
from retnet_tools.formats.inert import FAIRSEQ, HUGGING_FACE, TRAINING
from retnet_tools.formats.mapping import check_tie
from retnet_tools.formats.settings import Keys, Only, Settings, words
from retnet_tools.formats.spec import FormatSpec, Reading, Source
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.formats.torchscale_buffers import read_schedules
from retnet_tools.formats.torchscale_releases import (
    EMBEDDING,
    FFN_NORM,
    FINAL_NORM,
    HEAD,
    RELEASES,
    Release,
    find_release,
)
from retnet_tools.formats.torchscale_writing import write

ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "swish": "silu", "relu": "relu"}
PAPER_CLAMP_RELEASE = "0.3.0"
FAIRSEQ_SETTINGS = ("cfg.model", "args")
OWN_KEYS = frozenset({"moe_freq", "multiway", "share_decoder_input_output_embed", "no_output_layer"})
SYNCDOTH_KEYS = frozenset({"forward_impl", "use_glu", "use_lm_decay", "value_factor"})
DENSE = "a dense RetNet decoder with one embedding and one output projection"
KEYS = Keys(
    read=words(
        """
        activation_fn decoder_embed_dim decoder_ffn_embed_dim decoder_input_dim decoder_layers
        decoder_normalize_before decoder_output_dim decoder_retention_heads decoder_value_embed_dim deepnorm
        layernorm_embedding layernorm_eps no_scale_embedding share_decoder_input_output_embed subln
        torchscale_version vocab_size
        """
    ),
    only={
        "moe_freq": Only((0,), DENSE),
        "use_xmoe": Only((False,), DENSE),
        "multiway": Only((False,), DENSE),
        "no_output_layer": Only((False,), DENSE),
        "adaptive_input": Only((False,), DENSE),
        "character_embeddings": Only((False,), DENSE),
        "decoder_learned_pos": Only((False,), "relative positions alone"),
        "model_type": Only(("retnet",), "retnet"),
    },
    inert=HUGGING_FACE
    | TRAINING
    | FAIRSEQ
    | words(
        """
        _name adaptive_softmax_dropout adaptive_softmax_factor arch chunkwise_recurrent ddp_backend distributed_rank
        dummy_a2a encoder_normalize_before max_rel_pos max_target_positions memory_efficient_fp16 min_params_to_wrap
        moe_batch_prioritized_routing moe_eval_capacity_token_fraction moe_expert_count moe_expert_ffn_dim
        moe_gating_use_fp32 moe_normalize_expert_grad moe_normalize_gate_prob_before_dropping
        moe_second_expert_policy moe_top1_expert record_a2a_perf_stats recurrent_chunk_size rel_pos_buckets
        relu_dropout xpos_rel_pos xpos_scale_base
        """
    ),
)


def is_settings(document: Mapping[str, Any]) -> bool:
    """Its sizes by name, and none of the keys of syncdoth/RetNet."""
    return {"decoder_embed_dim", "decoder_retention_heads"} <= document.keys() and not SYNCDOTH_KEYS & document.keys()


def read(source: Source) -> Reading:
    """Resolve torchscale's configuration; which release wrote the tensors is told by their names.

    Raises:
        InputError: sizes that do not fit, tensors of no release, settings that contradict them.
    """
    settings, stored = source.settings, source.stored
    if EMBEDDING not in stored.locations:
        raise InputError(f"no tensor {EMBEDDING!r} or 'decoder.{EMBEDDING}'", "a torchscale RetNet decoder")
    release = find_release(stored)
    schedules = read_schedules(stored, "", *sizes_of_heads(settings))
    clamp, assumed = score_clamp(settings, release)
    config = resolve(
        settings,
        release,
        stored,
        decay=schedules.decay,
        rotary_frequencies=schedules.rotary_frequencies,
        clamp=clamp,
        fairseq=source.settings_name in FAIRSEQ_SETTINGS,
    )
    names = dict(release.names)
    if config.tie_word_embeddings:
        names[HEAD] = None
        check_tie(stored, HEAD, EMBEDDING)
    return Reading(config, release.version, names, notes=schedules.notes, assumed_clamp=assumed)


def sizes_of_heads(settings: Settings) -> tuple[int, int]:
    """Heads, and the size of q and k of one."""
    embed, heads = settings.count("decoder_embed_dim"), settings.count("decoder_retention_heads")
    if embed % heads:
        raise settings.wrong("decoder_retention_heads", heads, f"a divisor of decoder_embed_dim = {embed}")
    for name in ("decoder_input_dim", "decoder_output_dim"):
        if settings.count(name, embed) != embed:
            raise settings.wrong(name, settings.raw(name), f"decoder_embed_dim = {embed}")
    return heads, embed // heads


def resolve(
    settings: Settings,
    release: Release,
    stored: StoredTensors,
    *,
    decay: tuple[float, ...],
    rotary_frequencies: tuple[float, ...],
    clamp: ScoreClamp,
    fairseq: bool,
) -> RetNetConfig:
    """The configuration, with what torchscale left to its defaults or to the tensors filled in.

    Args:
        fairseq: whether fairseq's defaults hold.
    """
    heads, head_k_dim = sizes_of_heads(settings)
    embed, layers = heads * head_k_dim, settings.count("decoder_layers")
    eps, deepnorm = settings.number("layernorm_eps", release.norm_eps), settings.flag("deepnorm", False)
    pre = _is_pre_norm(settings, stored, deepnorm)
    block_norm = BlockNorm(release.norm, eps, bias=release.norm_bias)
    return RetNetConfig(
        vocab_size=_vocab_size(settings, stored),
        hidden_size=embed,
        num_layers=layers,
        num_heads=heads,
        key_dim=embed,
        value_dim=_value_dim(settings, release, stored),
        decay=decay,
        rotary_frequencies=rotary_frequencies,
        score_normalization=ScoreNormalization(head_k_dim**-0.5, by_decay=True, clamp=clamp),
        head_norm=HeadNorm(release.norm, eps if release.head_norm_eps is None else release.head_norm_eps),
        block_norm=block_norm,
        feed_forward=FeedForward(
            release.feed_forward,
            settings.count("decoder_ffn_embed_dim"),
            settings.choice("activation_fn", ACTIVATIONS, "swish" if fairseq else "gelu"),
            bias=release.biases,
            norm=block_norm if _has_ffn_norm(settings, release, stored) else None,
        ),
        norm_order="pre" if pre else "post",
        residual_alpha=(2.0 * layers) ** 0.25 if deepnorm else 1.0,
        final_norm=pre,
        projection_bias=release.biases,
        embedding_scale=1.0 if settings.flag("no_scale_embedding", not fairseq) else math.sqrt(embed),
        embedding_norm=settings.flag("layernorm_embedding", False),
        tie_word_embeddings=settings.flag("share_decoder_input_output_embed", False),
    )


def _is_pre_norm(settings: Settings, stored: StoredTensors, deepnorm: bool) -> bool:
    """`decoder_normalize_before`; releases differ in whether deepnorm turns it off, so there the final norm tells,
    which only pre-norm has."""
    stated, has_final_norm = settings.flag("decoder_normalize_before", True), FINAL_NORM in stored.locations
    if has_final_norm and not stated:
        raise settings.wrong(
            "decoder_normalize_before", False, f"true, since the file holds {FINAL_NORM!r}", "correct the configuration"
        )
    return has_final_norm if deepnorm else stated


def _has_ffn_norm(settings: Settings, release: Release, stored: StoredTensors) -> bool:
    """Only a plain feed-forward network has one, where `subln` is on."""
    found = FFN_NORM in stored.locations
    if settings.flag("subln", found) != found and release.feed_forward == "plain":
        raise settings.wrong("subln", not found, f"{str(found).lower()}, as the tensors say")
    return found


def _value_dim(settings: Settings, release: Release, stored: StoredTensors) -> int:
    if release.feed_forward == "glu":
        location = stored.locations.get("layers.0.retention.v_proj.weight")
        rows = location.shape[0] if location is not None and location.shape else None
        return settings.count("decoder_value_embed_dim", rows)
    fixed = 2 * settings.count("decoder_embed_dim")
    if (stated := settings.count("decoder_value_embed_dim", fixed)) != fixed:
        raise settings.wrong("decoder_value_embed_dim", stated, f"{fixed}, twice decoder_embed_dim in this release")
    return fixed


def _vocab_size(settings: Settings, stored: StoredTensors) -> int:
    """Rows of the embedding, once its shape agrees with what the configuration says."""
    shape, embed = stored.locations[EMBEDDING].shape, settings.count("decoder_embed_dim")
    if len(shape) != 2 or shape[1] != embed:
        raise InputError(f"tensor {EMBEDDING!r} has shape {list(shape)}", f"decoder_embed_dim = {embed} columns")
    stated = settings.raw("vocab_size")
    if stated not in (None, -1) and stated != shape[0]:
        raise InputError(
            f"the embedding {EMBEDDING!r} has {shape[0]} rows", f"vocab_size = {stated!r}", "correct vocab_size"
        )
    return shape[0]


def score_clamp(settings: Settings, release: Release) -> tuple[ScoreClamp, bool]:
    """The clamp, and whether it is assumed: release 0.3.0 stores the same tensors and clamps |sum|, not sum of ||."""
    version = settings.text("torchscale_version", "")
    if release.clamp == "sum_of_abs" and version.split()[:1] == [PAPER_CLAMP_RELEASE]:
        return "abs_of_sum", False
    return release.clamp, release.clamp == "sum_of_abs" and not version


TORCHSCALE = FormatSpec(
    name="torchscale",
    layout="torchscale",
    keys=KEYS,
    is_settings=is_settings,
    settings_words="decoder_embed_dim and decoder_retention_heads",
    marks=("layers.0.retention.q_proj.weight", EMBEDDING),
    names=tuple(dict.fromkeys(name for release in RELEASES for name in release.names)),
    read=read,
    outer_head={"lm_head.weight": HEAD, HEAD: HEAD},
    write=write,
)
