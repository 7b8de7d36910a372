"""The options that say how tokens are chosen."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

_option = partial(typer.Option, rich_help_panel="Sampling")

Temperature = Annotated[
    float | None, _option("--temperature", "--temp", help="0, the default, takes the likeliest token.")
]
TopK = Annotated[int | None, _option("--top-k", help="Keep the k likeliest tokens; 0, the default, keeps all.")]
TopP = Annotated[float | None, _option("--top-p", help="Keep the smallest set of this probability; 1 keeps all.")]
MinP = Annotated[float | None, _option("--min-p", help="Keep tokens of this share of the best one's probability.")]
RepetitionPenalty = Annotated[
    float | None, _option("--repetition-penalty", help="Above 1 makes tokens of the text so far less likely.")
]
Seed = Annotated[int | None, _option("--seed", help="Seed of the sampler; 0 if left out.", min=0)]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}
