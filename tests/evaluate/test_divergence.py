"""The figures of llama-perplexity against plain sums and the jackknife."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from retnet_tools.distributions import TokenTable, compare_logits
from retnet_tools.evaluate.estimates import divergence
from tests.evaluate.test_estimates import jackknife

TOKENS, VOCAB = 2000, 50


@pytest.fixture(scope="module")
def tokens() -> TokenTable:
    rng = np.random.default_rng(0)
    base = 2 * rng.standard_normal((TOKENS, VOCAB))
    return compare_logits(base, base + 0.3 * rng.standard_normal(base.shape), rng.integers(0, VOCAB, TOKENS))


def test_every_figure_is_the_plain_sum_of_its_definition(tokens: TokenTable) -> None:
    found = divergence(tokens)
    q, base, kl = ([float(x) for x in a] for a in (tokens.nll, tokens.baseline_nll, tokens.kl))
    dp = [math.exp(-a) - math.exp(-b) for a, b in zip(q, base, strict=True)]
    ranked = sorted(kl)
    assert found.mean_kld.value == pytest.approx(statistics.fmean(kl))
    assert found.mean_kld.error == pytest.approx(statistics.stdev(kl) / math.sqrt(TOKENS))
    assert found.median_kld == pytest.approx(statistics.median(kl))
    assert found.max_kld == ranked[-1]
    assert found.kld[0.0] == ranked[0]
    # 0.99 of the 1999 steps between 2000 values is 1979.01.
    assert found.kld[0.99] == pytest.approx(ranked[1979] + 0.01 * (ranked[1980] - ranked[1979]))
    assert found.mean_delta_p.value == pytest.approx(statistics.fmean(dp))
    assert found.rms_delta_p.value == pytest.approx(math.sqrt(statistics.fmean(x * x for x in dp)))
    assert found.delta_p[0.5] == pytest.approx(statistics.median(dp))
    same = statistics.fmean(map(float, tokens.same_top))
    assert 0.5 < same < 1
    assert found.same_top.value == pytest.approx(same)
    assert found.same_top.error == pytest.approx(math.sqrt(same * (1 - same) / (TOKENS - 1)))
    ratio = math.exp(statistics.fmean(q)) / math.exp(statistics.fmean(base))
    assert found.log_ppl_ratio.value == pytest.approx(math.log(ratio))
    assert found.ppl_ratio.value == pytest.approx(ratio)
    assert found.ppl_difference.value == pytest.approx(math.exp(statistics.fmean(q)) - math.exp(statistics.fmean(base)))
    assert found.correlation == pytest.approx(statistics.correlation(q, base))


def test_errors_know_what_model_and_baseline_have_in_common(tokens: TokenTable) -> None:
    found = divergence(tokens)
    q, base = tokens.nll, tokens.baseline_nll
    apart = math.hypot(statistics.stdev(q), statistics.stdev(base)) / math.sqrt(TOKENS)
    assert found.log_ppl_ratio.error < apart / 4

    def ratio(i: np.ndarray) -> float:
        return float(np.exp(q[i].mean()) / np.exp(base[i].mean()))

    def difference(i: np.ndarray) -> float:
        return float(np.exp(q[i].mean()) - np.exp(base[i].mean()))

    def rms(i: np.ndarray) -> float:
        return float(np.sqrt((tokens.delta_p[i] ** 2).mean()))

    assert found.ppl_ratio.error == pytest.approx(jackknife(TOKENS, ratio), rel=0.02)
    assert found.ppl_difference.error == pytest.approx(jackknife(TOKENS, difference), rel=0.02)
    assert found.rms_delta_p.error == pytest.approx(jackknife(TOKENS, rms), rel=0.05)


def test_a_model_against_itself_is_zero_everywhere(tokens: TokenTable) -> None:
    logits = np.random.default_rng(1).standard_normal((40, VOCAB))
    found = divergence(compare_logits(logits, logits, np.arange(40)))
    assert (found.mean_kld.value, found.max_kld, found.rms_delta_p.value, found.log_ppl_ratio.value) == (0, 0, 0, 0)
    assert (found.same_top.value, found.ppl_ratio.value) == (1, 1)
    assert found.correlation == pytest.approx(1)


def test_figures_out_of_the_range_of_float64_are_not_numbers_rather_than_errors() -> None:
    huge = np.full(5, 1e6)
    found = divergence(
        TokenTable(nll=huge, baseline_nll=huge, kl=np.zeros(5), delta_p=np.zeros(5), same_top=np.ones(5, bool))
    )
    assert math.isnan(found.ppl_difference.value)
    assert math.isnan(found.correlation)
    one = TokenTable(nll=np.ones(5), baseline_nll=huge, kl=np.zeros(5), delta_p=np.zeros(5), same_top=np.ones(5, bool))
    assert math.isnan(divergence(one).ppl_difference.value)
