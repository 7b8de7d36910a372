"""Matrices that are stored as parts of others: every row in its place."""

from __future__ import annotations

import numpy as np
import pytest

from retnet_tools.formats.mapping import head_part, row_range


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("count", [2, 3])
def test_rows_that_are_stored_head_by_head_are_found_by_their_number(heads: int, count: int) -> None:
    """Row n of head h of matrix i is stored as row (h count + i) N + n."""
    size = 4
    stored = np.arange(heads * count * size)[:, None] * np.ones(5)
    for i in range(count):
        expected = [(h * count + i) * size + n for h in range(heads) for n in range(size)]
        part = head_part(i, count, heads)
        assert part.apply([stored])[:, 0].tolist() == expected
        assert part.stored_shape((heads * size, 5)) == stored.shape


def test_matrices_below_each_other_are_cut_apart() -> None:
    stored = np.arange(7)[:, None] * np.ones(3)
    assert row_range(0, 3, 7).apply([stored])[:, 0].tolist() == [0, 1, 2]
    assert row_range(3, 4, 7).apply([stored])[:, 0].tolist() == [3, 4, 5, 6]
