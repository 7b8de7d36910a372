"""How far a model's distributions are from a baseline's, in the figures of llama-perplexity and under its names."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from retnet_tools.distributions import TokenDivergence
from retnet_tools.evaluate.estimates import Estimate, mean
from retnet_tools.weights import Array

KLD_QUANTILES = (1.0, 0.999, 0.99, 0.95, 0.9, 0.5, 0.1, 0.05, 0.01, 0.0)
DELTA_P_QUANTILES = (1.0, 0.999, 0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01, 0.001, 0.0)


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


def divergence(tokens: TokenDivergence) -> Divergence:
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


def _ppl_difference(tokens: TokenDivergence) -> Estimate:
    """e^a - e^b for the mean NLL a and b; its error is that of the mean of e^a NLL_Q - e^b NLL_base."""
    ppl, base = mean(tokens.nll).exp().value, mean(tokens.baseline_nll).exp().value
    if not (math.isfinite(ppl) and math.isfinite(base)):
        return Estimate(math.nan, math.nan)
    return Estimate(ppl - base, mean(ppl * tokens.nll - base * tokens.baseline_nll).error)


def _correlation(a: Array, b: Array) -> float:
    x, y = a - a.mean(), b - b.mean()
    scale = math.sqrt(float((x**2).sum()) * float((y**2).sum()))
    return float((x * y).sum()) / scale if scale else math.nan
