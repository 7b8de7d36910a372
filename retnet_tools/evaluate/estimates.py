"""Means with their standard errors, and in these how far a model's distributions are from a baseline's: the figures of
llama-perplexity, under its names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from retnet_tools.distributions import TokenTable
from retnet_tools.weights import Array

INDEPENDENCE = (
    "± is one standard error with tokens taken as independent; neighbours in a text are not, so the true one is larger"
)

KLD_QUANTILES = (1.0, 0.999, 0.99, 0.95, 0.9, 0.5, 0.1, 0.05, 0.01, 0.0)
DELTA_P_QUANTILES = (1.0, 0.999, 0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01, 0.001, 0.0)


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


@dataclass(frozen=True)
class Divergence:
    """A model Q against a baseline, over N tokens.

    Attributes:
        mean_kld: mean of KL(base || Q), nats a token.
        kld: its quantiles, by fraction (1.0 is the maximum).
        mean_delta_p: mean of p_Q(token) - p_base(token) of the text's own tokens.
        rms_delta_p: root of its mean square.
        delta_p: its quantiles, by fraction.
        same_top: part of the tokens before which both rank the same token first.
        log_ppl_ratio: ln(PPL(Q) / PPL(base)) = mean of NLL_Q - NLL_base, with the error of that mean, in which what
            the two have in common cancels (var Q + var base - 2 cov).
        ppl_ratio: e to the power of that.
        ppl_difference: PPL(Q) - PPL(base), likewise.
        correlation: of the two NLL over the tokens; NaN where one is constant.
    """

    mean_kld: Estimate
    kld: dict[float, float]
    mean_delta_p: Estimate
    rms_delta_p: Estimate
    delta_p: dict[float, float]
    same_top: Estimate
    log_ppl_ratio: Estimate
    ppl_ratio: Estimate
    ppl_difference: Estimate
    correlation: float

    @property
    def max_kld(self) -> float:
        """The largest divergence of a token."""
        return self.kld[1.0]

    @property
    def median_kld(self) -> float:
        """The divergence that half of the tokens stay below."""
        return self.kld[0.5]


def divergence(tokens: TokenTable) -> Divergence:
    """The figures of one or more tokens; every error is one of independent tokens."""
    log_ratio = mean(tokens.nll - tokens.baseline_nll)
    return Divergence(
        mean_kld=mean(tokens.kl),
        kld=quantiles(tokens.kl, KLD_QUANTILES),
        mean_delta_p=mean(tokens.delta_p),
        rms_delta_p=mean(tokens.delta_p**2).sqrt(),
        delta_p=quantiles(tokens.delta_p, DELTA_P_QUANTILES),
        same_top=mean(tokens.same_top.astype(np.float64)),
        log_ppl_ratio=log_ratio,
        ppl_ratio=log_ratio.exp(),
        ppl_difference=_ppl_difference(tokens),
        correlation=_correlation(tokens.nll, tokens.baseline_nll),
    )


def quantiles(values: Array, fractions: tuple[float, ...]) -> dict[float, float]:
    """Quantiles by fraction, linear between neighbours as llama-perplexity has them."""
    return dict(zip(fractions, map(float, np.quantile(values, fractions)), strict=True))


def _ppl_difference(tokens: TokenTable) -> Estimate:
    """e^a - e^b for the mean NLL a and b; its error is that of the mean of e^a NLL_Q - e^b NLL_base."""
    ppl, base = mean(tokens.nll).exp().value, mean(tokens.baseline_nll).exp().value
    if not (math.isfinite(ppl) and math.isfinite(base)):
        return Estimate(math.nan, math.nan)
    return Estimate(ppl - base, mean(ppl * tokens.nll - base * tokens.baseline_nll).error)


def _correlation(a: Array, b: Array) -> float:
    x, y = a - a.mean(), b - b.mean()
    scale = math.sqrt(float((x**2).sum()) * float((y**2).sum()))
    return float((x * y).sum()) / scale if scale else math.nan
