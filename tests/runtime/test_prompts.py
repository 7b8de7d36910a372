"""Ragged prompts: padded on the right and cut so that every real token is run once, in order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retnet_tools.errors import UsageError
from retnet_tools.runtime.prompts import Prompts


@given(
    rows=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=20), min_size=1, max_size=5), size=st.integers(1, 9)
)
def test_chunks_hold_every_token_once_and_say_where_rows_end(rows: list[list[int]], size: int) -> None:
    found: list[list[int]] = [[] for _ in rows]
    ended = np.zeros(len(rows), dtype=bool)
    for chunk in Prompts.of(rows, None, dtype="int64", width=()).chunks(size):
        assert chunk.tokens.shape == chunk.mask.shape
        assert (np.diff(chunk.mask, axis=1) <= 0).all()
        assert (chunk.tokens[chunk.mask == 0] == 0).all()
        assert not (ended & (chunk.counts > 0)).any()
        ended |= chunk.ends
        for row, tokens, count in zip(found, chunk.tokens, chunk.counts, strict=True):
            row.extend(tokens[:count].tolist())
        assert (ended == [len(a) == len(b) for a, b in zip(found, rows, strict=True)]).all()
    assert found == rows


def test_lengths_cut_rows_and_hide_what_follows() -> None:
    array = np.array([[1, 2, 3], [4, -100, -100]])
    prompts = Prompts.of(array, [3, 1], dtype="int64", width=())
    np.testing.assert_array_equal(prompts.tokens, [[1, 2, 3], [4, 0, 0]])
    assert prompts.lengths.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("rows", "lengths", "width", "message"),
    [
        ([[1], []], None, (), "an empty prompt in row 1"),
        ([[1, 2]], [0], (), "an empty prompt in row 0"),
        ([[1, 2], [3]], [1, -1], (), "an empty prompt in row 1"),
        ([[1, 2]], [3], (), r"lengths \[3\]; expected one for each row, at most \[2\]"),
        ([[1, 2]], [1, 1], (), r"lengths \[1, 1\]"),
        ([[1, 2], [[3]]], None, (), r"shape \[1, 1\] in row 1; expected \[tokens\]"),
        ([[[1.0, 2.0]]], None, (3,), r"shape \[1, 2\] in row 0; expected \[tokens, 3\]"),
    ],
)
def test_what_is_no_batch_of_prompts_is_refused(rows, lengths, width, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Prompts.of(rows, lengths, dtype="float32" if width else "int64", width=width)


def test_a_chunk_holds_at_least_one_token() -> None:
    with pytest.raises(UsageError, match="--chunk-size 0"):
        next(Prompts.of([[1]], None, dtype="int64", width=()).chunks(0))
