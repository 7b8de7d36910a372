"""The options that say how tokens are chosen."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Temperature = Annotated[float | None, typer.Option("--temperature", help="0, the default, takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Keep the k likeliest tokens; 0, the default, keeps all.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Keep the smallest set of this probability; 1 keeps all.")]
MinP = Annotated[float | None, typer.Option("--min-p", help="Keep tokens of this share of the best one's probability.")]
RepetitionPenalty = Annotated[
    float | None, typer.Option("--repetition-penalty", help="Above 1 makes tokens of the text so far less likely.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the sampler; 0 if left out.", min=0)]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}
