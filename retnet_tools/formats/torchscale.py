"""microsoft/torchscale: fairseq's `.pt`, and a state dict with its `RetNetConfig` as JSON beside, in any wrapper.

Several releases store different tensors (`torchscale_tensors`); the tensors tell which one wrote a file. Written is a
bare state dict `model.pt` with `vars(RetNetConfig)` as `args.json`, which `RetNetDecoder.load_state_dict` takes
strictly: buffers are stored too, and a tied output projection under both names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from retnet_tools.config import BlockNorm, FeedForward, HeadNorm, RetNetConfig, ScoreClamp, ScoreNormalization
from retnet_tools.errors import InputError
from retnet_tools.formats import torchscale_tensors as tensors
from retnet_tools.formats.mapping import stored_name
from retnet_tools.formats.settings import FAIRSEQ, Keys, Only, Settings, words
from retnet_tools.formats.spec import TORCH_FILE, FormatSpec, Reading, Source, Writing
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.formats.torchscale_tensors import EMBEDDING, FINAL_NORM, HEAD, RELEASES, Release

PAPER_CLAMP_RELEASE = "0.3.0"
TIED = "share_decoder_input_output_embed"
OWN_KEYS = frozenset({"moe_freq", "multiway", TIED, "no_output_layer"})
SYNCDOTH_KEYS = frozenset({"forward_impl", "use_glu", "use_lm_decay", "value_factor"})
DENSE = "a dense RetNet decoder with one embedding and one output projection"
KEYS = Keys(
    read=tensors.KEYS | words(f"decoder_input_dim decoder_output_dim {TIED} torchscale_version"),
    only={
        "moe_freq": Only((0,), DENSE),
        **dict.fromkeys(words("use_xmoe multiway no_output_layer adaptive_input"), Only((False,), DENSE)),
        "character_embeddings": Only((False,), DENSE),
        "decoder_learned_pos": Only((False,), "relative positions alone"),
        "model_type": Only(("retnet",), "retnet"),
    },
    inert=FAIRSEQ
    | words(
        """
        _name adaptive_softmax_dropout adaptive_softmax_factor arch chunkwise_recurrent dummy_a2a
        encoder_normalize_before max_rel_pos min_params_to_wrap moe_batch_prioritized_routing
        moe_eval_capacity_token_fraction moe_expert_count moe_expert_ffn_dim moe_gating_use_fp32
        moe_normalize_expert_grad moe_normalize_gate_prob_before_dropping moe_second_expert_policy moe_top1_expert
        record_a2a_perf_stats recurrent_chunk_size rel_pos_buckets relu_dropout xpos_rel_pos xpos_scale_base
        """
    ),
)


def _read(source: Source) -> Reading:
    if EMBEDDING not in source.stored.locations:
        raise InputError(f"no tensor {EMBEDDING!r} or 'decoder.{EMBEDDING}'", "a torchscale RetNet decoder")
    fairseq = source.document.name in ("cfg.model", "args")
    return read_decoder(source, tied=source.settings.flag(TIED, False), fairseq=fairseq)


def read_decoder(
    source: Source,
    *,
    tied: bool,
    fairseq: bool = False,
    prefix: str = "",
    embeddings: Sequence[str] = (EMBEDDING,),
    heads: Sequence[str] = (HEAD,),
) -> Reading:
    """Resolve torchscale's configuration; which release wrote the tensors is told by their names.

    Args:
        tied: whether the embedding is the output projection too.
        fairseq: whether fairseq's defaults hold.
        prefix: of the decoder's names.
        embeddings, heads: the names that the embedding and the output projection may have, several at once.

    Raises:
        InputError: sizes or settings that do not fit the tensors, tensors of no release, names of one that differ.
    """
    stored = source.stored
    embedding = stored_name(stored, (*embeddings, *heads) if tied else embeddings)
    head = None if tied else stored_name(stored, heads)
    if embedding is None:
        raise InputError(f"no tensor {embeddings[0]!r}", f"the embedding of {source.settings.origin}")
    plain = StoredTensors(
        {name.removeprefix(prefix): at for name, at in stored.locations.items() if name.startswith(prefix)}
        | {EMBEDDING: stored.locations[embedding]}
    )
    release = tensors.find_release(plain)
    clamp, assumed = _score_clamp(source.settings, release)
    num_heads, head_k_dim = _sizes_of_heads(source.settings)
    decay, frequencies = tensors.read_buffers(source, prefix, num_heads, head_k_dim)
    config = RetNetConfig(
        **_fields(source.settings, plain, release, fairseq=fairseq),
        decay=decay,
        rotary_frequencies=frequencies,
        score_normalization=ScoreNormalization(head_k_dim**-0.5, by_decay=True, clamp=clamp),
        tie_word_embeddings=tied,
    )
    dropped = dict.fromkeys((prefix + "version", prefix + HEAD, *embeddings, *heads))
    kept = {embedding: "embedding.weight"} | ({} if tied else {head or heads[0]: "lm_head.weight"})
    names = {**tensors.decoder_names(release.feed_forward, prefix, f"{prefix}output_projection"), **dropped, **kept}
    return Reading(config, release.version, names, assumed_clamp=assumed)


def _sizes_of_heads(settings: Settings) -> tuple[int, int]:
    """Heads, and the size of q and k of one."""
    embed, heads = settings.count("decoder_embed_dim"), settings.count("decoder_retention_heads")
    if embed % heads:
        raise settings.wrong("decoder_retention_heads", heads, f"a divisor of decoder_embed_dim = {embed}")
    for name in ("decoder_input_dim", "decoder_output_dim"):
        if settings.count(name, embed) != embed:
            raise settings.wrong(name, settings.raw(name), f"decoder_embed_dim = {embed}")
    return heads, embed // heads


def _fields(settings: Settings, stored: StoredTensors, release: Release, *, fairseq: bool) -> dict[str, Any]:
    """The fields of the configuration, with what torchscale left to its defaults or to the tensors filled in."""
    embed, layers = settings.count("decoder_embed_dim"), settings.count("decoder_layers")
    eps, deepnorm = settings.number("layernorm_eps", release.norm_eps), settings.flag("deepnorm", False)
    pre, heads = _is_pre_norm(settings, stored, deepnorm), settings.count("decoder_retention_heads")
    block_norm = BlockNorm(release.norm, eps, bias=release.norm == "layer")
    common = tensors.decoder_fields(settings, embed, heads, layers, pre=pre, deepnorm=deepnorm, scaled=fairseq)
    return common | {
        "vocab_size": _vocab_size(settings, stored),
        "value_dim": _value_dim(settings, release, stored),
        "head_norm": HeadNorm(release.norm, eps if release.head_norm_eps is None else release.head_norm_eps),
        "block_norm": block_norm,
        "feed_forward": FeedForward(
            release.feed_forward,
            settings.count("decoder_ffn_embed_dim"),
            settings.choice("activation_fn", tensors.ACTIVATIONS, "swish" if fairseq else "gelu"),
            bias=release.feed_forward == "plain",
            norm=block_norm if _has_ffn_norm(settings, release, stored) else None,
        ),
        "projection_bias": release.feed_forward == "plain",
    }


def _is_pre_norm(settings: Settings, stored: StoredTensors, deepnorm: bool) -> bool:
    """`decoder_normalize_before`; releases differ in whether deepnorm turns it off, so there the final norm tells,
    which only pre-norm has."""
    stated, has_final_norm = settings.flag("decoder_normalize_before", True), FINAL_NORM in stored.locations
    if has_final_norm and not stated:
        expected = f"true, since the file holds {FINAL_NORM!r}"
        raise settings.wrong("decoder_normalize_before", False, expected, "correct the configuration")
    return has_final_norm if deepnorm else stated


def _has_ffn_norm(settings: Settings, release: Release, stored: StoredTensors) -> bool:
    """Only a plain feed-forward network has one, where `subln` is on."""
    found = tensors.FFN_NORM in stored.locations
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
        rows = f"the embedding {EMBEDDING!r} has {shape[0]} rows"
        raise InputError(rows, f"vocab_size = {stated!r}", "correct vocab_size")
    return shape[0]


def _score_clamp(settings: Settings, release: Release) -> tuple[ScoreClamp, bool]:
    """The clamp, and whether it is assumed: release 0.3.0 stores the same tensors and clamps |sum|, not sum of ||."""
    version = settings.text("torchscale_version", "")
    if release.clamp == "sum_of_abs" and version.split()[:1] == [PAPER_CLAMP_RELEASE]:
        return "abs_of_sum", False
    return release.clamp, release.clamp == "sum_of_abs" and not version


def _write(config: RetNetConfig, assumed_clamp: bool) -> Writing:
    deepnorm, kind, tied = config.residual_alpha != 1.0, config.feed_forward.kind, config.tie_word_embeddings
    paper_clamp = config.score_normalization.clamp == "abs_of_sum" and kind == "glu"
    known = (kind, config.block_norm.kind) in [(release.feed_forward, release.norm) for release in RELEASES]
    written = kind if known and config.projection_bias == (kind == "plain") else "glu"
    settings = {
        **tensors.written_sizes(config),
        "no_scale_embedding": config.embedding_scale == 1.0,
        "layernorm_embedding": config.embedding_norm,
        "deepnorm": deepnorm,
        "subln": not deepnorm and config.norm_order == "pre",
        TIED: tied,
        "layernorm_eps": config.block_norm.eps,
        "vocab_size": config.vocab_size,
        "torchscale_version": None if assumed_clamp else PAPER_CLAMP_RELEASE if paper_clamp else "main",
    }
    return Writing(
        settings,
        tensors.decoder_names(written),
        settings_file="args.json",
        weights_file=TORCH_FILE,
        ties={HEAD: EMBEDDING} if tied else {},
        buffers=tensors.written_buffers(config),
    )


TORCHSCALE = FormatSpec(
    name="torchscale",
    layout="torchscale",
    keys=KEYS,
    is_settings=lambda document: (
        {"decoder_embed_dim", "decoder_retention_heads"} <= document.keys() and not SYNCDOTH_KEYS & document.keys()
    ),
    settings_words="decoder_embed_dim and decoder_retention_heads",
    marks=("layers.0.retention.q_proj.weight", EMBEDDING),
    names={**tensors.decoder_names("glu"), **tensors.decoder_names("plain"), "version": None},
    read=_read,
    outer_head={"lm_head.weight": HEAD, HEAD: HEAD},
    write=_write,
)
