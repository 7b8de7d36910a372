"""torchscale's RetNet inside models with configuration keys of their own, which are translated to torchscale's.

A Hugging Face wrapper (`model_type: retnet` with `num_retention_heads`) has torchscale's tensors under
`model.decoder.`. A distillation project (github.com/bigwolfeman/Retnet-Distillation) has them under `decoder.`, a
LayerNorm behind the final norm, and its configuration among what it trained with. Both have one embedding under several
names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from retnet_tools.config import BlockNorm
from retnet_tools.errors import InputError
from retnet_tools.formats.inert import HUGGING_FACE, TRAINING
from retnet_tools.formats.mapping import stored_name
from retnet_tools.formats.settings import Keys, Only, Settings, words
from retnet_tools.formats.spec import FormatSpec, NameTable, Reading, Source
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.formats.torchscale import KEYS as TORCHSCALE_KEYS
from retnet_tools.formats.torchscale import resolve, score_clamp, sizes_of_heads
from retnet_tools.formats.torchscale_buffers import read_schedules
from retnet_tools.formats.torchscale_releases import EMBEDDING, HEAD, RELEASES, find_release

HUGGING_FACE_PREFIX, STUDENT_PREFIX = "model.decoder.", "decoder."
HUGGING_FACE_EMBEDDINGS = ("model.embed_tokens.weight", "model.decoder.embed_tokens.weight")
HUGGING_FACE_HEADS = ("lm_head.weight", "model.decoder.output_projection.weight")
STUDENT_EMBEDDINGS = ("embed.weight", "decoder.embed_tokens.weight")
STUDENT_HEADS = ("lm_head.proj.weight",)
STUDENT_NORM = "norm"
STUDENT_NORM_EPS = 1e-5
HUGGING_FACE_KEYS = Keys(
    read=TORCHSCALE_KEYS.read,
    only=TORCHSCALE_KEYS.only,
    inert=TORCHSCALE_KEYS.inert,
    aliases={
        "hidden_act": "activation_fn",
        "hidden_size": "decoder_embed_dim",
        "intermediate_size": "decoder_ffn_embed_dim",
        "num_hidden_layers": "decoder_layers",
        "num_retention_heads": "decoder_retention_heads",
        "rms_norm_eps": "layernorm_eps",
        "tie_word_embeddings": "share_decoder_input_output_embed",
        "value_dim": "decoder_value_embed_dim",
    },
)
STUDENT_KEYS = Keys(
    read=words("d_model n_heads n_layers tie_word_embeddings vocab_size"),
    only={
        "activation_fn": Only(("gelu",), "gelu, which its backbone always has"),
        "layernorm_eps": Only((STUDENT_NORM_EPS,), "1e-5, which its backbone always has"),
        "mlp_mult": Only((4,), "4, which its backbone always has"),
        "normalize_before": Only((True,), "true, which its backbone always has"),
    },
    inert=HUGGING_FACE
    | TRAINING
    | words(
        """
        chunkwise_recurrent config_version created_at recurrent_chunk_size target_param_count_range teacher_model
        variant
        """
    ),
)


def is_hugging_face(document: Mapping[str, Any]) -> bool:
    """Sizes as transformers names them, and heads of retention."""
    return document.get("model_type") == "retnet" and {"hidden_size", "num_retention_heads"} <= document.keys()


def is_student(document: Mapping[str, Any]) -> bool:
    """The student's sizes, and what its backbone ignores."""
    return {"d_model", "n_heads", "n_layers", "mlp_mult"} <= document.keys()


def read_hugging_face(source: Source) -> Reading:
    """Resolve the wrapper's configuration.

    Raises:
        InputError: as torchscale's; names of one tensor that differ.
    """
    version = "torchscale (in Hugging Face's transformers)"
    return _read(source, source.settings, version, HUGGING_FACE_PREFIX, HUGGING_FACE_EMBEDDINGS, HUGGING_FACE_HEADS)


def read_student(source: Source) -> Reading:
    """Resolve the student's configuration; what its backbone fixes in its code is filled in.

    Raises:
        InputError: as torchscale's; names of one tensor that differ.
    """
    own = source.settings
    embed = own.count("d_model")
    settings = Settings(
        own.origin,
        {
            "decoder_embed_dim": embed,
            "decoder_value_embed_dim": embed,
            "decoder_ffn_embed_dim": 4 * embed,
            "decoder_layers": own.count("n_layers"),
            "decoder_retention_heads": own.count("n_heads"),
            "layernorm_eps": STUDENT_NORM_EPS,
            "no_scale_embedding": False,
            "share_decoder_input_output_embed": own.flag("tie_word_embeddings", True),
            "vocab_size": own.count("vocab_size"),
        },
    )
    version = "torchscale (in a distillation project)"
    reading = _read(source, settings, version, STUDENT_PREFIX, STUDENT_EMBEDDINGS, STUDENT_HEADS)
    config = replace(reading.config, output_norm=BlockNorm("layer", STUDENT_NORM_EPS, bias=True))
    norm = {f"{STUDENT_NORM}.{part}": f"output_norm.{part}" for part in ("weight", "bias")}
    return replace(reading, config=config, names={**reading.names, **norm}, assumed_clamp=False)


def _read(
    source: Source, settings: Settings, version: str, prefix: str, embeddings: Sequence[str], heads: Sequence[str]
) -> Reading:
    """The configuration by torchscale's rules, and the name table.

    A tie that is not stated is told by the tensors, as transformers would have it.
    """
    stored = source.stored
    tied = settings.raw("share_decoder_input_output_embed")
    if tied is None:
        head = next((name for name in heads if name in stored.locations), None)
        tied = head is None or any(name in stored.locations and stored.same_data(head, name) for name in embeddings)
    settings = replace(settings, values={**settings.values, "share_decoder_input_output_embed": tied})
    embedding = stored_name(stored, (*embeddings, *heads) if tied else embeddings)
    head = None if tied else stored_name(stored, heads)
    if embedding is None:
        raise InputError(f"no tensor {embeddings[0]!r}", f"the embedding of {settings.origin}")
    plain = StoredTensors(
        {EMBEDDING: stored.locations[embedding]}
        | {name.removeprefix(prefix): at for name, at in stored.locations.items() if name.startswith(prefix)}
    )
    release = find_release(plain)
    schedules = read_schedules(stored, prefix, *sizes_of_heads(settings))
    clamp, assumed = score_clamp(settings, release)
    config = resolve(
        settings,
        release,
        plain,
        decay=schedules.decay,
        rotary_frequencies=schedules.rotary_frequencies,
        clamp=clamp,
        fairseq=False,
    )
    names: dict[str, str | None] = {prefix + name: to for name, to in release.names.items()}
    names |= dict.fromkeys((prefix + HEAD, *embeddings, *heads))
    names[embedding] = "embedding.weight"
    if not tied:
        names[head or heads[0]] = "lm_head.weight"
    return Reading(config, version, names, notes=schedules.notes, assumed_clamp=assumed)


def _names(prefix: str, others: Sequence[str]) -> tuple[str, ...]:
    tables: Sequence[NameTable] = [release.names for release in RELEASES]
    return (*dict.fromkeys(prefix + name for table in tables for name in table), *others)


TORCHSCALE_HUGGING_FACE = FormatSpec(
    name="torchscale-hf",
    layout="torchscale in Hugging Face's transformers",
    keys=HUGGING_FACE_KEYS,
    is_settings=is_hugging_face,
    settings_words='"model_type": "retnet" and num_retention_heads',
    marks=(f"{HUGGING_FACE_PREFIX}layers.0.retention.q_proj.weight",),
    names=_names(HUGGING_FACE_PREFIX, (*HUGGING_FACE_EMBEDDINGS, *HUGGING_FACE_HEADS)),
    read=read_hugging_face,
)
TORCHSCALE_STUDENT = FormatSpec(
    name="torchscale-student",
    layout="torchscale in a distillation project",
    keys=STUDENT_KEYS,
    is_settings=is_student,
    settings_words="d_model, n_heads, n_layers and mlp_mult",
    marks=(f"{STUDENT_PREFIX}layers.0.retention.q_proj.weight", f"{STUDENT_NORM}.bias"),
    names=_names(
        STUDENT_PREFIX, (*STUDENT_EMBEDDINGS, *STUDENT_HEADS, f"{STUDENT_NORM}.weight", f"{STUDENT_NORM}.bias")
    ),
    read=read_student,
)
