"""A checkpoint that does not tell its clamp: both are tried and the better fit is judged; a wrong model still fails."""

from dataclasses import replace

import pytest
import torch

from retnet_tools.errors import VerificationError
from retnet_tools.model.agreement import require_agreement, select_forms
from retnet_tools.model.clamps import compare_clamps
from retnet_tools.model.retention import FORMS, retention_parallel, retention_recurrent
from retnet_tools.model.runs import estimated_memory
from tests.helpers import BASE, random_source, random_tokens
from tests.model.planted import LENGTH, by_pair, compare, scaled_in_call

CLAMPS = ("abs_of_sum", "sum_of_abs")
THREE = ("parallel", "recurrent", "chunkwise")
each_clamp = pytest.mark.parametrize("assumed", CLAMPS)


def with_clamp(clamp, eps):
    scores = replace(BASE.score_normalization, clamp=clamp)
    return replace(BASE, score_normalization=scores).with_head_norm_eps(eps)


def compare_both(config, forms=None, seed=1, **options):
    forms = forms or select_forms(THREE, chunk_size=7)
    return compare_clamps(config, random_source(config, seed), random_tokens(config, 2, LENGTH, seed), forms, **options)


@each_clamp
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_each_clamp_has_the_numbers_of_a_run_of_its_own(assumed, dtype):
    report = compare_both(with_clamp(assumed, 1e-3), dtype=dtype)
    assert [fit.clamp for fit in report.clamps] == [assumed, next(c for c in CLAMPS if c != assumed)]
    for fit in report.clamps:
        alone = by_pair(compare(with_clamp(fit.clamp, 1e-3), dtype=dtype))["parallel", "recurrent"]
        assert (fit.against, fit.run, fit.float64) == ("recurrent", alone.run.max_abs, alone.float64.max_abs)
    a, b = sorted(fit.float64 for fit in report.clamps)
    assert b > 5 * a


@each_clamp
def test_the_report_is_that_of_the_clamp_that_fits_better(assumed):
    report = compare_both(with_clamp(assumed, 1e-3))
    assert report.clamp == min(report.clamps, key=lambda fit: fit.float64).clamp == "abs_of_sum"
    alone = compare(with_clamp("abs_of_sum", 1e-3))
    assert report.comparisons == alone.comparisons
    assert report.handoffs == alone.handoffs


@each_clamp
def test_rounding_does_not_choose_the_clamp(assumed):
    def parallel(q, k, v, decay, *, score_clamp="none", **options):
        output, state = retention_parallel(q, k, v, decay, score_clamp=score_clamp, **options)
        noise = 1e-2 if q.dtype == torch.float32 and score_clamp == "abs_of_sum" else 0
        return output + noise * v, state

    report = compare_both(with_clamp(assumed, 1e-3), {"parallel": parallel, "recurrent": retention_recurrent})
    fits = {fit.clamp: fit for fit in report.clamps}
    assert fits["abs_of_sum"].run > fits["sum_of_abs"].run
    assert report.clamp == "abs_of_sum"


@each_clamp
@pytest.mark.parametrize("names", [THREE, ("chunkwise", "recurrent", "parallel"), ("parallel", "chunkwise")])
def test_a_healthy_model_of_either_kind_passes(assumed, names):
    """Under sum_of_abs alone it is over the budget of epsilon."""
    report = compare_both(with_clamp(assumed, 1e-4), forms=select_forms(names, chunk_size=7))
    assert report.passed
    assert {name for pair in by_pair(report) for name in pair} == set(names)
    assert list(by_pair(report)) == list(by_pair(compare(with_clamp(assumed, 1e-4), select_forms(names, 7))))
    assert not compare(with_clamp("sum_of_abs", 1e-4), forms=select_forms(names, chunk_size=7)).passed


@each_clamp
@pytest.mark.parametrize(
    "changed",
    [
        {"recurrent": scaled_in_call(0, 1e-6)},
        {"recurrent": scaled_in_call(1, 1e-3)},
        {"parallel": scaled_in_call(0, 1e-6)},
    ],
)
def test_a_wrong_model_fails_under_both_clamps(assumed, changed):
    forms = {"parallel": retention_parallel, "recurrent": retention_recurrent} | changed
    report = compare_both(with_clamp(assumed, 1e-5), forms=forms)
    assert [c.exceeded for c in report.comparisons] == ["logic"]
    with pytest.raises(VerificationError, match=r"parallel and recurrent differ by .*logic"):
        require_agreement(report)


@each_clamp
def test_a_clamp_under_which_the_outputs_are_no_numbers_does_not_fit(assumed):
    def parallel(*arguments, score_clamp, **options):
        y, state = retention_parallel(*arguments, score_clamp="none", **options)
        return (y * float("nan") if score_clamp == assumed else y), state

    report = compare_both(with_clamp(assumed, 1e-5), forms={"parallel": parallel, "recurrent": retention_recurrent})
    assert report.clamp == next(clamp for clamp in CLAMPS if clamp != assumed)


def test_without_the_parallel_form_there_is_nothing_to_choose():
    config, forms = with_clamp("sum_of_abs", 1e-3), select_forms(("recurrent", "chunkwise"), chunk_size=7)
    assert compare_both(config, forms) == compare(config, forms)


def test_progress_counts_one_form_more():
    calls = []
    compare_both(BASE, progress=lambda what, done, total: calls.append((what, done, total)))
    assert [(done, total) for _, done, total in calls] == [(n, 13) for n in range(13)]
    assert sum("parallel" in what for what, _, _ in calls) == 6


def test_memory_is_estimated_for_both(monkeypatch):
    asked = []

    def estimate(config, rows, tokens, forms):
        asked.append(estimated_memory(config, rows, tokens, forms))
        return asked[-1]

    monkeypatch.setattr("retnet_tools.model.runs.estimated_memory", estimate)
    compare_both(BASE, dict(FORMS))
    width = BASE.vocab_size + (BASE.num_layers + 1) * BASE.hidden_size
    one_form = 8 * 2 * LENGTH * width
    assert asked == [estimated_memory(BASE, 2, LENGTH, FORMS) + one_form]
