"""Every two values meet, in far fewer rows than there are combinations."""

from __future__ import annotations

import itertools
import math

import pytest

from tests.pairs import pairwise


@pytest.mark.parametrize("sizes", [(2, 2), (5, 3, 2), (2, 2, 2, 2, 2), (54, 2, 3, 2, 2), (4, 4, 4)], ids=str)
def test_any_two_values_of_two_axes_meet(sizes: tuple[int, ...]) -> None:
    axes = [[f"{axis}:{i}" for i in range(size)] for axis, size in enumerate(sizes)]
    rows = pairwise(*axes)
    assert all(len(row) == len(axes) and all(v in axis for v, axis in zip(row, axes, strict=True)) for row in rows)
    for (i, one), (j, other) in itertools.combinations(enumerate(axes), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(one, other))
    one, other = sorted(sizes)[-2:]
    assert len(rows) == len(set(rows)) <= one * other + sum(sizes)
    assert len(sizes) < 3 or len(rows) < math.prod(sizes)
