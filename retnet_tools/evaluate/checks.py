"""What a verdict is made of: named checks, each with a figure and its limit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from retnet_tools.weights import Array


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        part: what of an export it is about: text, weights, graphs, cost or files.
        name: what it is called in reports, alone in its part.
        measured, limit: the worst figure that was seen, and what it may be at its place.
        unit: of both.
        where: of the worst one: layer, head, row, position, tensor; empty where there is none.
        count: how many figures there were.
    """

    part: str
    name: str
    measured: float
    limit: float
    unit: str
    where: str = ""
    count: int = 1

    @property
    def passed(self) -> bool:
        """Whether the figure is within its limit; one that is no number is not."""
        return self.measured <= self.limit

    @property
    def excess(self) -> float:
        """How many times its limit the figure is."""
        if math.isnan(self.measured) or math.isnan(self.limit):
            return math.inf
        if self.limit == 0:
            return math.inf if self.measured > 0 else 0.0
        return self.measured / self.limit


class Expectation(Protocol):
    """What a walk gives, as `retnet_tools.model.reference.Expected`, which is not imported: it takes torch along."""

    logits: Array
    logits_apart: list[Array]
    states: dict[int, list[Array]]
    states_apart: dict[int, list[list[Array]]]


def worst(checks: Iterable[Check]) -> Check:
    """Of one check in several places the place where it is furthest over its limit, or nearest to it."""
    found = list(checks)
    most = max(found, key=lambda check: check.excess)
    return Check(most.part, most.name, most.measured, most.limit, most.unit, most.where, len(found))
