"""Whether a model gets better or worse along a row: figures by the number of tokens that were seen before.

A recurrent state carries whatever error it has picked up, so a model whose state is stored or computed coarsely may
drift from its baseline as the row goes on. Many rows, begun at even distances in the text, make bins that differ by
their context and not by what the text is about; a single row does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from retnet_tools.distributions import TokenTable
from retnet_tools.evaluate.estimates import Estimate, mean, student_t
from retnet_tools.weights import Array

CONFIDENCE = 0.95
LEAST_CLUSTERS = 8
"""Fewer give no interval worth the name."""
CLUSTER_TOKENS = 256
"""Length of the pieces that rows are cut into where there are too few rows."""

Verdict = Literal["grows", "shrinks", "no trend seen", "unknown"]


@dataclass(frozen=True)
class PositionBin:
    """Predictions with `first` to `last` tokens of context; `kld` is the mean KL(base || Q)."""

    first: int
    last: int
    tokens: int
    nll: Estimate
    baseline_nll: Estimate | None
    kld: Estimate | None


@dataclass(frozen=True)
class Trend:
    """The straight line y = a + b log2(context) through all predictions, by least squares.

    Attributes:
        slope: b, by how much y grows with each doubling of the context.
        low, high: its 95% interval; NaN with fewer than 8 clusters. Errors within a cluster may depend on each other
            in any way (cluster-robust variance, Student's t): a cluster is a row, or 256 tokens of it where there are
            fewer than 8 rows.
        clusters: how many.
        mean: of y, to compare the slope with.
    """

    slope: float
    low: float
    high: float
    clusters: int
    mean: float

    @property
    def verdict(self) -> Verdict:
        """What the interval says."""
        if math.isnan(self.low):
            return "unknown"
        if self.low > 0:
            return "grows"
        return "shrinks" if self.high < 0 else "no trend seen"


@dataclass(frozen=True)
class ByPosition:
    """Figures along the rows, from rows that do not overlap; `trend` is that of KLD, or None without a baseline."""

    bins: tuple[PositionBin, ...]
    trend: Trend | None


def by_position(tokens: TokenTable) -> ByPosition:
    """Bins by context, 1, 2, 3-4, 5-8, 9-16 and so on, and the trend of the divergence.

    Every prediction of the rows that do not overlap takes part, also those that are not scored.
    """
    tokens = tokens[tokens.apart]
    octave = np.ceil(np.log2(tokens.context)).astype(np.int64)
    bins = tuple(_bin(tokens[octave == k], int(k)) for k in np.unique(octave))
    return ByPosition(bins, trend(tokens.context, tokens.kl, _clusters(tokens)) if "kl" in vars(tokens) else None)


def trend(context: Array, values: Array, clusters: Array) -> Trend:
    """The line through values `[N]` over log2 of the context `[N]`.

    b = sum (x - mean x) y / sum (x - mean x)^2, with the variance G/(G-1) sum_g (sum_{i in g} (x_i - mean x) e_i)^2 /
    (sum (x - mean x)^2)^2 over G clusters with residuals e (Liang and Zeger 1986).

    Args:
        clusters: which cluster each value is of, `[N]` integers.
    """
    x = np.log2(context)
    x -= x.mean()
    spread, level = float((x**2).sum()), float(values.mean())
    names, cluster = np.unique(clusters, return_inverse=True)
    if spread == 0:
        return Trend(math.nan, math.nan, math.nan, len(names), level)
    slope = float((x * values).sum()) / spread
    if len(names) < LEAST_CLUSTERS:
        return Trend(slope, math.nan, math.nan, len(names), level)
    scores = np.bincount(cluster, weights=x * (values - level - slope * x))
    variance = len(names) / (len(names) - 1) * float((scores**2).sum()) / spread**2
    half = student_t((1 + CONFIDENCE) / 2, len(names) - 1) * math.sqrt(variance)
    return Trend(slope, slope - half, slope + half, len(names), level)


def _bin(tokens: TokenTable, octave: int) -> PositionBin:
    against = "kl" in vars(tokens)
    return PositionBin(
        first=(1 << octave) // 2 + 1 if octave else 1,
        last=min(1 << octave, int(tokens.context.max())),
        tokens=len(tokens.nll),
        nll=mean(tokens.nll),
        baseline_nll=mean(tokens.baseline_nll) if against else None,
        kld=mean(tokens.kl) if against else None,
    )


def _clusters(tokens: TokenTable) -> Array:
    few = len(np.unique(tokens.row)) < LEAST_CLUSTERS
    pieces = (tokens.context - 1) // CLUSTER_TOKENS if few else np.zeros_like(tokens.row)
    return np.asarray(tokens.row * (int(pieces.max()) + 1) + pieces)
