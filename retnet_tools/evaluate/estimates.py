"""Means with their standard errors, and what is computed from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from retnet_tools.weights import Array

INDEPENDENCE = (
    "± is one standard error with tokens taken as independent; neighbours in a text are not, so the true one is larger"
)


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, both in the same unit; the error of a single observation is NaN."""

    value: float
    error: float

    def scaled(self, factor: float) -> Estimate:
        """The same in another unit."""
        return Estimate(self.value * factor, self.error * abs(factor))

    def exp(self) -> Estimate:
        """e^x with the error e^x dx (delta method); infinite where float64 ends."""
        with np.errstate(over="ignore"):
            value = float(np.exp(self.value))
        return Estimate(value, value * self.error if self.error else 0.0)

    def sqrt(self) -> Estimate:
        """sqrt(x) with the error dx / (2 sqrt(x)) (delta method)."""
        value = math.sqrt(self.value)
        return Estimate(value, self.error / (2 * value) if value else 0.0)


def mean(values: Array) -> Estimate:
    """Mean of `[N]` with s / sqrt(N), s being the sample standard deviation."""
    count = len(values)
    error = float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(float(values.mean()), error)


def ratio(numerators: Array, denominators: Array) -> Estimate:
    """R = sum(x) / sum(y) over pairs `[N]`, with sqrt(N / (N-1) sum (x - R y)^2) / sum(y) (delta method)."""
    count, total = len(numerators), float(denominators.sum())
    value = float(numerators.sum()) / total
    residuals = numerators - value * denominators
    error = math.sqrt(count / (count - 1) * float((residuals**2).sum())) / total if count > 1 else math.nan
    return Estimate(value, error)


def student_t(probability: float, degrees: int) -> float:
    """Quantile of Student's t, from the normal one by its expansion in 1/degrees.

    Within 0.001 for 7 degrees of freedom and more and probabilities up to 0.975. Source: Abramowitz and Stegun, 26.7.5.
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return float(sum(term / degrees**power for power, term in enumerate(terms)))
