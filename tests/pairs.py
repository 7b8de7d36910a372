"""Fewer cases than all combinations of their parameters, which still show whatever one choice or two together break."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any


def pairwise(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value of each axis in which any two values of two axes meet: the same rows each time, and few more
    than the two longest axes have combinations."""
    values = [list(axis) for axis in axes]
    order = sorted(range(len(values)), key=lambda axis: -len(values[axis]))
    first, second, *others = order
    rows = [{first: i, second: j} for i, j in itertools.product(range(len(values[first])), range(len(values[second])))]
    for n, axis in enumerate(others, start=2):
        known, choices, used = order[:n], range(len(values[axis])), Counter[int]()
        missing = {(other, i, choice) for other in known for i in range(len(values[other])) for choice in choices}
        for row in rows:
            row[axis] = max(choices, key=lambda choice: (_met(missing, row, known, choice), -used[choice]))
            used[row[axis]] += 1
            missing -= {(other, row[other], row[axis]) for other in known}
        while missing:
            _, _, choice = min(missing)
            rest = {other: i for other, i, c in sorted(missing, reverse=True) if c == choice}
            rows.append({**dict.fromkeys(known, 0), **rest, axis: choice})
            missing -= {(other, rows[-1][other], choice) for other in known}
    rows.sort(key=lambda row: [row[axis] for axis in range(len(values))])
    return [tuple(values[axis][row[axis]] for axis in range(len(values))) for row in rows]


def _met(missing: set[tuple[int, int, int]], row: dict[int, int], known: list[int], choice: int) -> int:
    return sum((other, row[other], choice) in missing for other in known)
