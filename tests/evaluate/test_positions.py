"""Whether an error grows along the row is told from whether it does not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from retnet_tools.distributions import TokenTable
from retnet_tools.evaluate.positions import LEAST_CLUSTERS, Trend, by_position, trend
from retnet_tools.weights import Array


def predictions(rows: int, context: int, kl: Array | None = None, seed: int = 0) -> TokenTable:
    """`rows` rows of `context` predictions; `kl` is `[rows, context]`."""
    size = rows * context
    nll = np.random.default_rng(seed).gamma(2.0, 1.0, size)
    against = {} if kl is None else {"baseline_nll": nll + 0.1, "kl": kl.ravel(), "same_top": np.ones(size, bool)}
    row, place = np.divmod(np.arange(size), context)
    everything = np.ones(size, bool)
    return TokenTable(
        index=np.arange(size) + 1, row=row, context=place + 1, scored=everything, apart=everything, nll=nll, **against
    )


def test_bins_are_octaves_of_the_context_and_hold_their_predictions() -> None:
    tokens = predictions(3, 11)
    bins = by_position(tokens).bins
    assert [(b.first, b.last) for b in bins] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 11)]
    assert [b.tokens for b in bins] == [3, 3, 6, 12, 9]
    for b in bins:
        members = [float(x) for x, c in zip(tokens.nll, tokens.context, strict=True) if b.first <= c <= b.last]
        assert b.nll.value == pytest.approx(sum(members) / len(members))
        assert (b.kld, b.baseline_nll) == (None, None)


def test_octaves_are_exact_at_powers_of_two_up_to_the_last_position() -> None:
    context = np.array([n for k in range(1, 25) for n in (2**k - 1, 2**k, 2**k + 1)])
    size, everything = len(context), np.ones(len(context), bool)
    tokens = TokenTable(row=np.zeros(size, int), context=context, apart=everything, nll=context * 1.0)
    for b in by_position(tokens).bins:
        members = [c for c in context if b.first <= c <= b.last]
        assert b.tokens == len(members)
        assert b.nll.value == pytest.approx(sum(members) / len(members))


def test_only_rows_that_are_apart_take_part() -> None:
    tokens = predictions(4, 8)
    half = TokenTable(**{**vars(tokens), "apart": tokens.row % 2 == 0})
    assert sum(b.tokens for b in by_position(half).bins) == 16


def test_the_slope_is_that_of_least_squares() -> None:
    rng = np.random.default_rng(1)
    context = np.tile(np.arange(1, 65), 20)
    values = 0.5 * np.log2(context) + rng.standard_normal(len(context))
    found = trend(context, values, np.repeat(np.arange(20), 64))
    assert found.slope == pytest.approx(np.polyfit(np.log2(context), values, 1)[0], rel=1e-12)
    assert found.low < 0.5 < found.high
    assert (found.clusters, found.mean) == (20, pytest.approx(values.mean()))


def test_the_interval_holds_the_truth_in_95_of_100_texts_where_rows_have_levels_and_slopes_of_their_own() -> None:
    rng = np.random.default_rng(2)
    x = np.log2(np.arange(1, 65))
    hits = naive_hits = 0
    for _ in range(400):
        level, slope = rng.standard_normal((2, 16, 1))
        values = level + (0.3 + slope) * x + 0.5 * rng.standard_normal((16, 64))
        found = trend(np.tile(np.arange(1, 65), 16), values.ravel(), np.repeat(np.arange(16), 64))
        hits += found.low < 0.3 < found.high
        residuals = values - values.mean() - found.slope * (x - x.mean())
        naive_hits += abs(found.slope - 0.3) < 1.96 * residuals.std() / math.sqrt(16 * 64) / x.std()
    assert 0.90 <= hits / 400 <= 0.98
    # With tokens taken as independent it would not.
    assert naive_hits / 400 < 0.75


@pytest.mark.parametrize(
    ("growth", "verdict"), [(0.0, "no trend seen"), (0.02, "grows"), (-0.02, "shrinks")], ids=["flat", "up", "down"]
)
def test_the_verdict(growth: float, verdict: str) -> None:
    place = np.arange(1, 129)
    kl = np.random.default_rng(5).gamma(1.0, 1.0, (40, 128)) * (1 + growth * place if growth >= 0 else 1 / (1 + place))
    found = by_position(predictions(40, 128, kl)).trend
    assert found is not None
    assert found.verdict == verdict
    assert found.clusters == 40


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.0, 1.0, "no trend seen"), (-1.0, 0.0, "no trend seen"), (1e-9, 1.0, "grows"), (-1.0, -1e-9, "shrinks")],
)
def test_an_interval_that_touches_zero_tells_nothing(low: float, high: float, verdict: str) -> None:
    assert Trend((low + high) / 2, low, high, 40, 1.0).verdict == verdict


def test_few_rows_are_cut_into_pieces_and_too_few_pieces_give_no_interval() -> None:
    kl = np.random.default_rng(6).gamma(1.0, 1.0, (1, 256 * LEAST_CLUSTERS))
    assert by_position(predictions(1, kl.shape[1], kl)).trend.clusters == LEAST_CLUSTERS
    found = by_position(predictions(1, kl.shape[1] - 256, kl[:, 256:])).trend
    assert (found.verdict, found.clusters) == ("unknown", LEAST_CLUSTERS - 1)
    assert math.isnan(found.low)
    two = by_position(predictions(2, 1024, kl.reshape(2, 1024))).trend
    assert two.clusters == LEAST_CLUSTERS


def test_one_context_alone_has_no_trend() -> None:
    found = by_position(predictions(20, 1, np.ones((20, 1)))).trend
    assert math.isnan(found.slope)
    assert found.verdict == "unknown"
