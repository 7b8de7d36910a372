"""Standard errors against the jackknife and the standard library."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest

from retnet_tools.evaluate.estimates import Estimate, mean, ratio, student_t
from retnet_tools.weights import Array


def jackknife(count: int, figure: Callable[[Array], float]) -> float:
    """The standard error of a figure of `count` observations, from leaving each out in turn."""
    left_out = np.array([figure(np.delete(np.arange(count), i)) for i in range(count)])
    return math.sqrt((count - 1) / count * float(((left_out - left_out.mean()) ** 2).sum()))


@pytest.fixture
def values() -> Array:
    return np.random.default_rng(0).gamma(2.0, 1.5, 400)


def test_the_error_of_a_mean(values: Array) -> None:
    found = mean(values)
    assert found.value == pytest.approx(statistics.fmean(values))
    assert found.error == pytest.approx(statistics.stdev(values) / 20)
    assert math.isnan(mean(values[:1]).error)


def test_the_error_of_exp_and_root_of_a_mean(values: Array) -> None:
    assert mean(values).exp().value == pytest.approx(math.exp(statistics.fmean(values)))
    assert mean(values).exp().error == pytest.approx(jackknife(400, lambda i: math.exp(values[i].mean())), rel=0.01)
    assert mean(values).sqrt().error == pytest.approx(jackknife(400, lambda i: math.sqrt(values[i].mean())), rel=0.01)
    assert mean(values * 1e4).exp().value == math.inf
    # A number that is known exactly has no error, however large it is.
    assert Estimate(1e4, 0.0).exp() == Estimate(math.inf, 0.0)
    assert Estimate(0.0, 0.5).sqrt() == Estimate(0.0, 0.0)


def test_the_error_of_a_ratio_knows_that_both_sides_vary_together(values: Array) -> None:
    sizes = np.random.default_rng(1).integers(1, 9, 400) + np.round(values)
    found = ratio(values, sizes)
    assert found.value == pytest.approx(values.sum() / sizes.sum())
    assert found.error == pytest.approx(jackknife(400, lambda i: values[i].sum() / sizes[i].sum()), rel=0.02)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(7, 2.3646), (10, 2.2281), (20, 2.0860), (60, 2.0003), (10**9, 1.9600)]
)
def test_students_t_equals_the_printed_tables(degrees: int, quantile: float) -> None:
    assert student_t(0.975, degrees) == pytest.approx(quantile, abs=1e-3)
