"""Every token is scored at most once, with the context that was promised."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retnet_tools.errors import UsageError
from retnet_tools.evaluate.scoring import Windows


@given(data=st.data(), tokens=st.integers(2, 200), context=st.integers(1, 80))
def test_each_token_from_the_first_that_has_its_context_is_scored_once(
    data: st.DataObject, tokens: int, context: int
) -> None:
    stride = data.draw(st.one_of(st.none(), st.integers(1, context)))
    used = (max(1, context // 2)) if stride is None else stride
    windows = Windows(context, stride)
    if tokens < context - used + 2:
        with pytest.raises(UsageError, match="a text of"):
            list(windows.rows(tokens))
        return
    rows = list(windows.rows(tokens))
    scored: Counter[int] = Counter()
    for k, row in enumerate(rows):
        assert row.start == k * used
        assert 1 <= row.length <= context
        assert row.start + row.length <= tokens - 1
        for place in range(row.length):
            if place >= row.skipped:
                scored[row.start + place + 1] += 1
                assert context - used < place + 1 <= context
    assert scored == Counter(range(context - used + 1, tokens))
    assert (windows.sizes(tokens)) == (context, used)


@given(tokens=st.integers(2, 300), context=st.integers(1, 60), share=st.integers(1, 60))
def test_rows_that_are_apart_predict_no_token_twice(tokens: int, context: int, share: int) -> None:
    stride = min(share, context)
    if tokens < context - stride + 2:
        return
    apart = [row for row in Windows(context, stride).rows(tokens) if row.apart]
    predicted = [row.start + place + 1 for row in apart for place in range(row.length)]
    assert len(predicted) == len(set(predicted))
    assert apart[0].start == 0


def test_the_whole_text_is_one_row_with_a_context_of_0() -> None:
    (row,) = Windows(0).rows(1000)
    assert (row.start, row.length, row.skipped) == (0, 999, 0)
    assert Windows(0).sizes(1000) == (999, 999)


@pytest.mark.parametrize(
    ("context", "stride", "message"),
    [(-1, None, "--context -1"), (8, 0, "--stride 0"), (8, 9, "--stride 9"), (0, 4, "--stride 4 with --context 0")],
)
def test_wrong_numbers_are_refused(context: int, stride: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Windows(context, stride)


@pytest.mark.parametrize(("windows", "tokens"), [(Windows(), 257), (Windows(0), 1), (Windows(8, 8), 1), (Windows(), 0)])
def test_a_text_too_short_says_how_long_it_has_to_be(windows: Windows, tokens: int) -> None:
    with pytest.raises(UsageError, match=f"a text of {tokens} token.*expected at least"):
        list(windows.rows(tokens))
