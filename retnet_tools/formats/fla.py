"""flash-linear-attention's `RetNetForCausalLM`: a Hugging Face folder, such as the fla-hub checkpoints.

Its rotation works on halves of a head, which `halves_to_pairs` turns into pairs at load. It scales q by 1/sqrt(K)
where we scale k, so its state is ours times sqrt(K). It stores no frequencies and no decay, and computes both in
float32. The feed-forward network is silu whatever `hidden_act` says: that is the activation of the output gate. Its
releases before February 2025 store the gate and up projections as one matrix, the gate's rows first, under the name of
the former. Those of 2024 had other keys (`rms_norm_eps`, `num_attention_heads`) and, until April, `model.embed_tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retnet_tools.config import Activation, BlockNorm, FeedForward, HeadNorm, RetNetConfig, ScoreNormalization
from retnet_tools.formats.mapping import halves_to_pairs, row_range
from retnet_tools.formats.schedules import floats, paper_log_decay, rope_frequencies
from retnet_tools.formats.settings import HUGGING_FACE, Keys, Only, Settings, words
from retnet_tools.formats.spec import FormatSpec, Reading, Source, Transform, Writing, in_layers, module_names
from retnet_tools.formats.xatl import XATL_KEYS

ORIGIN = "flash-linear-attention"
EMBEDDING, OLD_EMBEDDING = "model.embeddings.weight", "model.embed_tokens.weight"
FFN_GATE, FFN_UP = "model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"
FFN_PARTS = ("layers.{i}.ffn.gate_proj.weight", "layers.{i}.ffn.up_proj.weight")
FFN_MULTIPLE = 256
ACTIVATIONS: dict[str, Activation] = {
    "swish": "silu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "leaky_relu": "leaky_relu",
    "elu": "elu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}
LAYER = {
    "attn_norm": "retention_norm",
    **{f"attn.{x}_proj": f"retention.{x}_proj" for x in "qkv"},
    "attn.g_proj": "retention.gate_proj",
    "attn.o_proj": "retention.out_proj",
    "mlp_norm": "ffn_norm",
    **{f"mlp.{x}_proj": f"ffn.{x}_proj" for x in ("gate", "up", "down")},
}
FUSED_NAMES, PLAIN_NAMES = (
    module_names(
        {"model.embeddings": "embedding", "lm_head": "lm_head"}
        | in_layers("model.layers", LAYER)
        | {"model.norm": "final_norm"}
        | in_layers("model.layers", {f"attn.{head_norm}": "retention.head_norm"})
    )
    for head_norm in ("g_norm_swish_gate", "g_norm")
)
"""The head norm's name tells whether it is fused with a swish gate."""
KEYS = Keys(
    read=words(
        """
        elementwise_affine expand_k expand_v feature_map fuse_norm hidden_act hidden_ratio hidden_size
        intermediate_size norm_eps num_heads num_hidden_layers num_kv_heads tie_word_embeddings use_output_gate
        use_short_conv vocab_size
        """
    ),
    only={
        "attn": Only((), "retention in every layer"),
        "attnres_block_size": Only((), "plain residual connections"),
        "model_type": Only(("retnet",), "retnet"),
    },
    inert=HUGGING_FACE
    | words(
        """
        attn_mode conv_size fuse_cross_entropy fuse_linear_cross_entropy fuse_swiglu rescale_prenorm_residual
        prenorm_residual_strategy share_conv_kernel use_gk use_gv use_l2warp
        """
    ),
    aliases={"rms_norm_eps": "norm_eps", "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads"},
)


def _rotation(config: RetNetConfig) -> dict[str, Transform]:
    """q and k are stored for a rotation of halves."""
    return {f"layers.{{i}}.retention.{name}_proj.weight": halves_to_pairs(config.head_k_dim) for name in "qk"}


def _read(source: Source) -> Reading:
    settings, locations = source.settings, source.stored.locations
    if any("_conv1d." in name for name in locations):
        expected = "no short convolutions, whose tensors the file holds"
        raise settings.wrong("use_short_conv", True, expected, "they are not supported")
    if settings.flag("use_short_conv", False):
        source.notes.append("use_short_conv does nothing in this model, which has no convolutions")
    config = resolve(settings)
    fused = settings.text("hidden_act", "swish") == "swish" and settings.flag("fuse_norm", True)
    names = dict(FUSED_NAMES if fused and config.gate is not None else PLAIN_NAMES)
    changes = _rotation(config)
    dim, gate = config.feed_forward.dim, locations.get(FFN_GATE.format(i=0))
    merged = gate is not None and gate.shape[:1] == (2 * dim,) and FFN_UP.format(i=0) not in locations
    if OLD_EMBEDDING in locations:
        names[OLD_EMBEDDING] = names.pop(EMBEDDING)
        if not merged and settings.choice("hidden_act", ACTIVATIONS, "swish") != "silu":
            raise settings.wrong("hidden_act", settings.raw("hidden_act"), "swish in the release of 16 February 2024")
    if merged:
        names[FFN_GATE] = FFN_PARTS
        del names[FFN_UP]
        changes |= {name: row_range(i * dim, dim, 2 * dim) for i, name in enumerate(FFN_PARTS)}
    return Reading(config, ORIGIN, names, transforms=changes)


def resolve(settings: Settings) -> RetNetConfig:
    """The configuration, with flash-linear-attention's defaults filled in."""
    hidden, heads = settings.size("hidden_size", 2048), settings.size("num_heads", 8)
    key_dim = _expanded(settings, "expand_k", 1.0, hidden, heads)
    value_dim = _expanded(settings, "expand_v", 2.0, hidden, heads)
    kv_heads = settings.count("num_kv_heads", heads)
    if heads % kv_heads:
        raise settings.wrong("num_kv_heads", kv_heads, f"a divisor of num_heads = {heads}")
    head_k_dim, eps = key_dim // heads, settings.number("norm_eps", 1e-6)
    # A null is false here, not the default.
    affine = "elementwise_affine" not in settings.values or settings.flag("elementwise_affine", False)
    gate = settings.choice("hidden_act", ACTIVATIONS, "swish") if settings.flag("use_output_gate", True) else None
    return RetNetConfig(
        vocab_size=settings.size("vocab_size", 32000),
        hidden_size=hidden,
        num_layers=settings.size("num_hidden_layers", 24),
        num_heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        num_kv_groups=heads // kv_heads,
        feature_map=settings.choice("feature_map", ACTIVATIONS, "") if settings.has("feature_map") else None,
        decay=floats(paper_log_decay(heads)),
        rotary_frequencies=floats(rope_frequencies(head_k_dim)),
        score_normalization=ScoreNormalization(head_k_dim**-0.5, by_decay=False, clamp="none"),
        head_norm=HeadNorm("rms", eps, "shared" if affine else "none"),
        block_norm=BlockNorm("rms", eps),
        feed_forward=FeedForward("glu", _ffn_dim(settings, hidden), "silu"),
        gate=gate,
        tie_word_embeddings=settings.flag("tie_word_embeddings", False),
    )


def _expanded(settings: Settings, name: str, default: float, hidden: int, heads: int) -> int:
    size = int(hidden * settings.number(name, default))
    if not size or size % heads:
        expected = f"a factor that makes hidden_size = {hidden} a multiple of num_heads = {heads}"
        raise settings.wrong(name, settings.raw(name), expected)
    return size


def _ffn_dim(settings: Settings, hidden: int) -> int:
    """`intermediate_size`, or 2/3 of hidden_ratio times the hidden size, up to a multiple of 256.

    A ratio of null is 4, as it was before there was one; then heads had another name.
    """
    null = "hidden_ratio" in settings.values or settings.given.get("num_heads") == "num_attention_heads"
    ratio = settings.number("hidden_ratio", 4 if null else 2)
    derived = int(hidden * ratio * 2 / 3)
    return settings.count("intermediate_size", -(-derived // FFN_MULTIPLE) * FFN_MULTIPLE)


def _write(config: RetNetConfig, assumed_clamp: bool) -> Writing:
    """The files of a model, whose scores are never clamped."""
    word = {activation: name for name, activation in reversed(ACTIVATIONS.items())}
    settings = {
        "model_type": "retnet",
        "architectures": ["RetNetForCausalLM"],
        "attn_mode": "chunk",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "expand_k": config.key_dim / config.hidden_size,
        "expand_v": config.value_dim / config.hidden_size,
        "feature_map": None if config.feature_map is None else word[config.feature_map],
        "hidden_act": word["silu" if config.gate is None else config.gate],
        "use_output_gate": config.gate is not None,
        "use_short_conv": False,
        "intermediate_size": config.feed_forward.dim,
        "elementwise_affine": config.head_norm.weight != "none",
        "norm_eps": config.block_norm.eps,
        "fuse_norm": True,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    names = FUSED_NAMES if config.gate == "silu" else PLAIN_NAMES
    return Writing(settings, names, transforms=_rotation(config))


def _is_settings(document: Mapping[str, Any]) -> bool:
    """`model_type` retnet, its size as `hidden_size`, and its heads as no relative calls them."""
    heads = bool({"num_heads", "num_attention_heads"} & document.keys())
    named = document.get("model_type", "retnet") == "retnet"  # an object that is pickled leaves it out
    return named and "hidden_size" in document and heads and not {"qk_dim", *XATL_KEYS} & document.keys()


FLA = FormatSpec(
    name="fla",
    layout=ORIGIN,
    keys=KEYS,
    is_settings=_is_settings,
    settings_words='"model_type": "retnet", hidden_size and num_heads',
    marks=("model.layers.0.attn.q_proj.weight", "model.norm.weight"),
    names=(*FUSED_NAMES, *PLAIN_NAMES, OLD_EMBEDDING),
    read=_read,
    base="model.",
    outer_head={"lm_head.weight": "lm_head.weight"},
    write=_write,
)
