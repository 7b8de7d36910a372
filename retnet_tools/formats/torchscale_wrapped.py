"""torchscale's RetNet inside models with configuration keys of their own, which are translated to torchscale's.

A Hugging Face wrapper (`model_type: retnet` with `num_retention_heads`) has torchscale's tensors under
`model.decoder.`. A distillation project (github.com/bigwolfeman/Retnet-Distillation) has them under `decoder.`, a
LayerNorm behind the final norm, and its configuration among what it trained with. Both have one embedding under several
names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from retnet_tools.config import BlockNorm
from retnet_tools.formats.settings import HUGGING_FACE, Keys, Only, Settings, words
from retnet_tools.formats.spec import FormatSpec, Reading, Source
from retnet_tools.formats.torchscale import KEYS, TIED, TORCHSCALE, read_decoder

HUGGING_FACE_PREFIX, STUDENT_PREFIX = "model.decoder.", "decoder."
HUGGING_FACE_EMBEDDINGS = ("model.embed_tokens.weight", "model.decoder.embed_tokens.weight")
HUGGING_FACE_HEADS = ("lm_head.weight", "model.decoder.output_projection.weight")
STUDENT_EMBEDDINGS, STUDENT_HEADS = ("embed.weight", "decoder.embed_tokens.weight"), ("lm_head.proj.weight",)
STUDENT_NORM = {f"norm.{part}": f"output_norm.{part}" for part in ("weight", "bias")}
STUDENT_EPS = 1e-5
HUGGING_FACE_KEYS = replace(
    KEYS,
    aliases={
        "hidden_act": "activation_fn",
        "hidden_size": "decoder_embed_dim",
        "intermediate_size": "decoder_ffn_embed_dim",
        "num_hidden_layers": "decoder_layers",
        "num_retention_heads": "decoder_retention_heads",
        "rms_norm_eps": "layernorm_eps",
        "tie_word_embeddings": TIED,
        "value_dim": "decoder_value_embed_dim",
    },
)
STUDENT_KEYS = Keys(
    read=words("d_model n_heads n_layers tie_word_embeddings vocab_size"),
    only={
        "activation_fn": Only(("gelu",), "gelu, which its backbone always has"),
        "layernorm_eps": Only((STUDENT_EPS,), "1e-5, which its backbone always has"),
        "mlp_mult": Only((4,), "4, which its backbone always has"),
        "normalize_before": Only((True,), "true, which its backbone always has"),
    },
    inert=HUGGING_FACE
    | words("chunkwise_recurrent config_version created_at recurrent_chunk_size target_param_count_range")
    | words("teacher_model variant"),
)


def _read_hugging_face(source: Source) -> Reading:
    """A tie that is not stated is told by the tensors, as transformers would have it."""
    stored, embeddings, heads = source.stored, HUGGING_FACE_EMBEDDINGS, HUGGING_FACE_HEADS
    if source.settings.has(TIED):
        tied = source.settings.flag(TIED, False)
    else:
        head = next((name for name in heads if name in stored.locations), None)
        tied = head is None or any(name in stored.locations and stored.same_data(head, name) for name in embeddings)
    reading = read_decoder(source, tied=tied, prefix=HUGGING_FACE_PREFIX, embeddings=embeddings, heads=heads)
    return replace(reading, version="torchscale (in Hugging Face's transformers)")


def _read_student(source: Source) -> Reading:
    """What its backbone fixes in its code is filled in."""
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
            "layernorm_eps": STUDENT_EPS,
            "no_scale_embedding": False,
            "vocab_size": own.count("vocab_size"),
        },
    )
    reading = read_decoder(
        replace(source, settings=settings),
        tied=own.flag("tie_word_embeddings", True),
        prefix=STUDENT_PREFIX,
        embeddings=STUDENT_EMBEDDINGS,
        heads=STUDENT_HEADS,
    )
    return replace(
        reading,
        version="torchscale (in a distillation project)",
        config=replace(reading.config, output_norm=BlockNorm("layer", STUDENT_EPS, bias=True)),
        names={**reading.names, **STUDENT_NORM},
        assumed_clamp=False,
    )


def _names(prefix: str, others: Sequence[str]) -> tuple[str, ...]:
    return (*(prefix + name for name in TORCHSCALE.names), *others)


TORCHSCALE_HUGGING_FACE = FormatSpec(
    name="torchscale-hf",
    layout="torchscale in Hugging Face's transformers",
    keys=HUGGING_FACE_KEYS,
    is_settings=lambda document: (
        document.get("model_type") == "retnet" and {"hidden_size", "num_retention_heads"} <= document.keys()
    ),
    settings_words='"model_type": "retnet" and num_retention_heads',
    marks=(f"{HUGGING_FACE_PREFIX}layers.0.retention.q_proj.weight",),
    names=_names(HUGGING_FACE_PREFIX, (*HUGGING_FACE_EMBEDDINGS, *HUGGING_FACE_HEADS)),
    read=_read_hugging_face,
)
TORCHSCALE_STUDENT = FormatSpec(
    name="torchscale-student",
    layout="torchscale in a distillation project",
    keys=STUDENT_KEYS,
    is_settings=lambda document: {"d_model", "n_heads", "n_layers", "mlp_mult"} <= document.keys(),
    settings_words="d_model, n_heads, n_layers and mlp_mult",
    marks=(f"{STUDENT_PREFIX}layers.0.retention.q_proj.weight", "norm.bias"),
    names=_names(STUDENT_PREFIX, (*STUDENT_EMBEDDINGS, *STUDENT_HEADS, *STUDENT_NORM)),
    read=_read_student,
)
