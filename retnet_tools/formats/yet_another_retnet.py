"""fkodom/yet-another-retnet: a state dict, bare or as its training script saves it, with the keyword arguments of its
`RetNet` as JSON beside it.

Sizes follow from the tensors. The order of the norms, the activation and the epsilon do not: they are in those
arguments alone, where one that is left out has its default. Decay is not stored: its code computes it in the dtype of
the activations. Rotary angles are stored.
"""

from __future__ import annotations

from collections.abc import Mapping

from retnet_tools.config import Activation, BlockNorm, FeedForward, HeadNorm, RetNetConfig, ScoreNormalization
from retnet_tools.errors import InputError
from retnet_tools.formats.schedules import name_of_all, read_angles
from retnet_tools.formats.settings import TRAINING, Keys, Settings, words
from retnet_tools.formats.spec import FormatSpec, Reading, Source, in_layers, module_names
from retnet_tools.paper import language_model_decay

ORIGIN = "yet-another-retnet"
ANGLES = "decoder.layers.{i}.retention.thetas"
MARK = ANGLES.format(i=0)
ACTIVATIONS: dict[str, Activation] = {"swish": "silu", "gelu": "gelu", "relu": "relu"}
LAYER = {
    "norm1": "retention_norm",
    **{f"retention.{x}_proj": f"retention.{x}_proj" for x in "qkv"},
    "retention.g_proj": "retention.gate_proj",
    "retention.out_proj": "retention.out_proj",
    "norm2": "ffn_norm",
    "linear1": "ffn.up_proj",
    "linear2": "ffn.down_proj",
}
MODULES = {"embedding": "embedding", "out": "lm_head", **in_layers("decoder.layers", LAYER)}
NAMES = {**module_names(MODULES), ANGLES: None}
UNTOLD = ("activation", "norm_first", "layer_norm_eps")


def _read(source: Source) -> Reading:
    settings, stored = source.settings, source.stored
    if MARK not in stored.locations:
        raise InputError(f"no tensor {MARK!r}", "rotary angles: a model without relative positions is not supported")
    if not settings.values:
        found = f"nothing with these {ORIGIN} weights tells {', '.join(UNTOLD)}"
        expected = 'a JSON such as {"activation": "swish", "norm_first": true, "layer_norm_eps": 1e-6}'
        raise InputError(found, expected, "write it as args.json beside them, or name it with --config")
    sizes = _sizes(source)
    embed, heads = settings.count("d_model", sizes["d_model"]), settings.count("nhead", sizes["nhead"])
    if embed % heads:
        raise settings.wrong("nhead", heads, f"a divisor of d_model = {embed}")
    name_of_all(stored, ANGLES)
    return Reading(resolve(settings, sizes, read_angles(source, MARK, embed // heads)), ORIGIN, NAMES)


def _sizes(source: Source) -> dict[str, int]:
    """The sizes that the tensors tell; 1 where they are not there, which is found out tensor by tensor."""
    locations = source.stored.locations
    shapes = {name: location.shape for name, location in locations.items()}
    (tokens, embed), (ffn, _) = (
        shapes.get(name, ()) if len(shapes.get(name, ())) == 2 else (1, 1)
        for name in ("embedding.weight", "decoder.layers.0.linear1.weight")
    )
    angles = shapes[MARK][0] if shapes[MARK] else 1
    layers = sum(ANGLES.format(i=i) in locations for i in range(len(locations)))
    return {
        "num_tokens": tokens,
        "d_model": embed,
        "nhead": max(1, embed // angles),
        "num_layers": layers,
        "dim_feedforward": ffn,
    }


def resolve(settings: Settings, sizes: Mapping[str, int], frequencies: tuple[float, ...]) -> RetNetConfig:
    """The configuration, with the sizes of the tensors and the defaults of `RetNet` filled in."""
    size = {name: settings.count(name, found) for name, found in sizes.items()}
    embed, heads = size["d_model"], size["nhead"]
    activation = settings.choice("activation", ACTIVATIONS, "swish")
    return RetNetConfig(
        vocab_size=size["num_tokens"],
        hidden_size=embed,
        num_layers=size["num_layers"],
        num_heads=heads,
        key_dim=embed,
        value_dim=embed,
        decay=language_model_decay(heads),
        rotary_frequencies=frequencies,
        score_normalization=ScoreNormalization((embed // heads) ** -0.5, by_decay=False, clamp="none"),
        head_norm=HeadNorm("layer", 1e-6),
        block_norm=BlockNorm("layer", settings.number("layer_norm_eps", 1e-6), bias=True),
        feed_forward=FeedForward("plain", size["dim_feedforward"], activation, bias=True),
        gate=activation,
        norm_order="pre" if settings.flag("norm_first", True) else "branch",
        final_norm=False,
        projection_bias=True,
        head_bias=True,
    )


YET_ANOTHER_RETNET = FormatSpec(
    name=ORIGIN,
    layout=ORIGIN,
    keys=Keys(
        read=words("activation d_model dim_feedforward layer_norm_eps nhead norm_first num_layers num_tokens"),
        inert=TRAINING | {"dtype"},
    ),
    is_settings=lambda document: (
        {"num_tokens", "d_model", "nhead"} <= document.keys() or set(UNTOLD) <= document.keys()
    ),
    settings_words="num_tokens, d_model and nhead",
    marks=("decoder.layers.0.retention.q_proj.weight", "decoder.layers.0.linear1.weight"),
    names=NAMES,
    read=_read,
    needs_settings=False,
)
