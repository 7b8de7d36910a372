"""microsoft/torchscale: fairseq's `.pt`, and a bare state dict with its `RetNetConfig` as JSON beside.

Two releases store different tensors (`torchscale_releases`); the tensors tell which one wrote a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
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
from retnet_tools.formats.files import CheckpointFiles
from retnet_tools.formats.pickles import attributes
from retnet_tools.formats.settings import Settings
from retnet_tools.formats.spec import FormatSpec, Reading, check_tie
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.formats.torchscale_buffers import read_schedules
from retnet_tools.formats.torchscale_releases import (
    EMBEDDING,
    FFN_NORM,
    FINAL_NORM,
    HEAD,
    RELEASES,
    Release,
)
from retnet_tools.formats.torchscale_writing import write

ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "swish": "silu", "relu": "relu"}
PREFIXES = ("module.", "model.", "decoder.")
PAPER_CLAMP_RELEASE = "0.3.0"
CLAMP_NOTE = (
    f"torchscale {PAPER_CLAMP_RELEASE} stores the same tensors but clamps |sum| of the scores, not sum of ||, in its "
    f'parallel form; where this model is from it, an args.json with "torchscale_version": "{PAPER_CLAMP_RELEASE}" '
    "beside the bare state dict says so"
)


def _is_settings(document: Mapping[str, Any]) -> bool:
    return {"decoder_embed_dim", "decoder_retention_heads"} <= document.keys() and "model_type" not in document


def _fairseq_settings(files: CheckpointFiles) -> Settings | None:
    cfg = attributes(files.metadata.get("cfg"))
    for source in (None if cfg is None else cfg.get("model"), files.metadata.get("args")):
        values = attributes(source)
        if values is not None and _is_settings(values):
            return Settings("fairseq", values)
    return None


def _json_settings(files: CheckpointFiles) -> tuple[Path, Settings] | None:
    found = {path: document for path, document in files.configs.items() if _is_settings(document)}
    if not found:
        return None
    first, values = next(iter(found.items()))
    if any(other != values for other in found.values()):
        names = ", ".join(path.name for path in found)
        raise InputError(
            f"{files.folder} holds several torchscale configurations: {names}", "one", "move the others away"
        )
    return first, Settings("torchscale", values)


def detect(files: CheckpointFiles) -> bool:
    """fairseq's `cfg` or `args` inside the file, or torchscale's configuration as JSON beside it."""
    if files.weights_file is None:
        return False
    return _json_settings(files) is not None or _fairseq_settings(files) is not None


def read(files: CheckpointFiles) -> Reading:
    """Resolve torchscale's configuration; which release wrote the tensors is told by their names.

    Raises:
        InputError: no configuration, a kind of model that is not supported, tensors of neither release.
    """
    config_files: tuple[Path, ...] = ()
    settings = _fairseq_settings(files)
    if settings is None and (beside := _json_settings(files)) is not None:
        config_files, settings = (beside[0],), beside[1]
    if settings is None:
        raise InputError(
            f"no torchscale configuration for {files.path}",
            "fairseq's cfg inside the file, or args.json beside it",
            "write vars(RetNetConfig) as args.json beside it",
        )
    refuse_unsupported(settings)
    stored = files.tensors
    prefix = find_prefix(stored)
    release = find_release(stored, prefix)
    config, notes = resolve(settings, release, stored, prefix)
    names = dict(release.names)
    if config.tie_word_embeddings:
        names[HEAD] = None
        check_tie(stored, prefix + HEAD, prefix + EMBEDDING)
    return Reading(config, release.version, names, prefix, config_files=config_files, notes=tuple(notes))


def refuse_unsupported(settings: Settings) -> None:
    """Refuse the kinds of model that this package does not know, by the name of the setting."""
    embed = settings.count("decoder_embed_dim")
    refused = {
        "moe_freq": settings.number("moe_freq", 0) > 0,
        "use_xmoe": settings.flag("use_xmoe", False),
        "multiway": settings.flag("multiway", False),
        "no_output_layer": settings.flag("no_output_layer", False),
        "decoder_input_dim": settings.count("decoder_input_dim", embed) != embed,
        "decoder_output_dim": settings.count("decoder_output_dim", embed) != embed,
        "adaptive_softmax_cutoff": settings.values.get("adaptive_softmax_cutoff") is not None,
        "adaptive_input": settings.flag("adaptive_input", False),
        "character_embeddings": settings.flag("character_embeddings", False),
    }
    for name, found in refused.items():
        if found:
            raise InputError(
                f"the {settings.origin} configuration has {name} = {settings.values[name]!r}",
                "a dense RetNet decoder with one embedding and one output projection",
                "this kind of model is not supported",
            )


def find_prefix(stored: StoredTensors) -> str:
    """What wrappers put before every name: "", "decoder.", "module.model.decoder." and the like."""
    candidates = [name.removesuffix(EMBEDDING) for name in stored.names() if name.endswith(EMBEDDING)]
    for prefix in candidates:
        rest = prefix
        for part in PREFIXES:
            rest = rest.removeprefix(part)
        if not rest:
            return prefix
    raise InputError(
        f"no tensor {EMBEDDING!r} or 'decoder.{EMBEDDING}'", "a torchscale RetNet decoder", "name its file"
    )


def find_release(stored: StoredTensors, prefix: str) -> Release:
    """The release whose mark is stored.

    Raises:
        InputError: none, or both.
    """
    found = [release for release in RELEASES if prefix + release.mark in stored.locations]
    if len(found) != 1:
        marks = " or ".join(repr(prefix + release.mark) for release in RELEASES)
        raise InputError(f"tensors of {len(found) or 'no'} known torchscale releases", f"either {marks}")
    return found[0]


def resolve(settings: Settings, release: Release, stored: StoredTensors, prefix: str) -> tuple[RetNetConfig, list[str]]:
    """The configuration, with what torchscale left to its defaults or to the tensors filled in, and notes."""
    vocab_size = _vocab_size(settings, stored, prefix)
    embed, heads = settings.count("decoder_embed_dim"), settings.count("decoder_retention_heads")
    if embed % heads:
        raise InputError(
            f"the {settings.origin} configuration has decoder_retention_heads = {heads}",
            f"a divisor of decoder_embed_dim = {embed}",
        )
    layers, fairseq = settings.count("decoder_layers"), settings.origin == "fairseq"
    value_dim = (
        2 * embed if release.biases else settings.count("decoder_value_embed_dim", _rows(stored, prefix, "v_proj"))
    )
    activation = settings.text("activation_fn", "swish" if fairseq else "gelu")
    if activation not in ACTIVATIONS:
        raise InputError(
            f"the {settings.origin} configuration has activation_fn = {activation!r}",
            f"one of {', '.join(ACTIVATIONS)}",
        )
    eps = settings.number("layernorm_eps", release.norm_eps)
    deepnorm = settings.flag("deepnorm", False)
    # Releases differ in whether deepnorm means post-norm; the final norm, which only pre-norm has, tells.
    has_final_norm = prefix + FINAL_NORM in stored.locations
    pre = has_final_norm or (settings.flag("decoder_normalize_before", True) and not deepnorm)
    clamp, notes = _score_clamp(settings, release)
    schedules = read_schedules(stored, prefix, heads, embed // heads)
    block_norm = BlockNorm(release.norm, eps, bias=release.biases)
    config = RetNetConfig(
        vocab_size=vocab_size,
        hidden_size=embed,
        num_layers=layers,
        num_heads=heads,
        key_dim=embed,
        value_dim=value_dim,
        decay=schedules.decay,
        rotary_frequencies=schedules.rotary_frequencies,
        score_normalization=ScoreNormalization((embed // heads) ** -0.5, by_decay=True, clamp=clamp),
        head_norm=HeadNorm(release.norm, eps if release.head_norm_eps is None else release.head_norm_eps),
        block_norm=block_norm,
        feed_forward=FeedForward(
            release.feed_forward,
            settings.count("decoder_ffn_embed_dim"),
            ACTIVATIONS[activation],
            bias=release.biases,
            norm=block_norm if prefix + FFN_NORM in stored.locations else None,
        ),
        norm_order="pre" if pre else "post",
        residual_alpha=(2.0 * layers) ** 0.25 if deepnorm else 1.0,
        final_norm=pre,
        projection_bias=release.biases,
        embedding_scale=1.0 if settings.flag("no_scale_embedding", not fairseq) else math.sqrt(embed),
        embedding_norm=settings.flag("layernorm_embedding", False),
        tie_word_embeddings=settings.flag("share_decoder_input_output_embed", False),
    )
    return config, [*notes, *schedules.notes]


def _rows(stored: StoredTensors, prefix: str, projection: str) -> int | None:
    location = stored.locations.get(f"{prefix}layers.0.retention.{projection}.weight")
    return location.shape[0] if location is not None and location.shape else None


def _vocab_size(settings: Settings, stored: StoredTensors, prefix: str) -> int:
    """Rows of the embedding, once its shape agrees with what the configuration says."""
    name, shape = prefix + EMBEDDING, stored.locations[prefix + EMBEDDING].shape
    embed, stated = settings.count("decoder_embed_dim"), settings.values.get("vocab_size")
    if len(shape) != 2 or shape[1] != embed:
        raise InputError(f"tensor {name!r} has shape {list(shape)}", f"decoder_embed_dim = {embed} columns")
    if stated not in (None, -1) and stated != shape[0]:
        raise InputError(
            f"the embedding {name!r} has {shape[0]} rows", f"vocab_size = {stated!r}", "correct vocab_size"
        )
    return shape[0]


def _score_clamp(settings: Settings, release: Release) -> tuple[ScoreClamp, list[str]]:
    if release.clamp == "abs_of_sum":
        return release.clamp, []
    version = settings.text("torchscale_version", "")
    if version.split() and version.split()[0] == PAPER_CLAMP_RELEASE:
        return "abs_of_sum", []
    return release.clamp, [] if version else [CLAMP_NOTE]


TORCHSCALE = FormatSpec(
    name="torchscale",
    looked_for="a .pt with fairseq's cfg, or weights with a JSON beside that holds decoder_embed_dim and "
    "decoder_retention_heads",
    detect=detect,
    read=read,
    write=write,
)
