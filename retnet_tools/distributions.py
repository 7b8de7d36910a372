"""Distributions over the next token, from logits, in float64: log-softmax, surprise, Kullback-Leibler divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from retnet_tools.weights import Array

_BLOCK = 1 << 18
"""Logits that are worked on at a time: five float64 copies of them take 10 MB."""


@dataclass(frozen=True)
class TokenDivergence:
    """What a model and a baseline expected before each of N tokens; all `[N]`.

    Attributes:
        nll: -ln p(token), nats.
        baseline_nll: the same of the baseline.
        kl: KL(baseline || model) over the vocabulary, nats.
        same_top: bool, whether both rank the same token first.
    """

    nll: Array
    baseline_nll: Array
    kl: Array
    same_top: Array

    @property
    def delta_p(self) -> Array:
        """p(token) - p_baseline(token)."""
        return np.asarray(np.exp(-self.nll) - np.exp(-self.baseline_nll))

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Tokens of several calls, in order."""
        names = ("nll", "baseline_nll", "kl", "same_top")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def __getitem__(self, chosen: Array) -> Self:
        """Some of the tokens, by index or mask."""
        return self.__class__(*(a[chosen] for a in (self.nll, self.baseline_nll, self.kl, self.same_top)))


def log_softmax(logits: Array) -> Array:
    """ln p_i = z_i - ln sum_j exp(z_j) over the last axis, in float64."""
    z = np.array(logits, dtype=np.float64)
    z -= z.max(-1, keepdims=True)
    z -= np.log(np.exp(z).sum(-1, keepdims=True))
    return z


def kl_divergence(log_p: Array, log_q: Array) -> Array:
    """KL(p || q) = sum_i p_i (ln p_i - ln q_i) over the last axis, nats, from log-probabilities in float64.

    Computed as sum_i p_i (e^d - 1 - d), d = ln q_i - ln p_i, which is the same since both sum to 1: no term is
    negative, so that divergences far below 1e-16 are not lost in the rounding of terms that cancel.
    """
    p, d = np.exp(log_p), log_q - log_p
    terms = p * (np.expm1(np.minimum(d, 1.0)) - d)
    far = d > 1
    terms[far] = np.exp(log_q[far]) - p[far] * (1 + d[far])
    return np.asarray(terms.sum(-1))


def token_nll(logits: Array, tokens: Array) -> Array:
    """-ln p(token) of logits `[N, vocab]` for tokens `[N]`, as `[N]` float64 nats."""
    result = np.empty(len(tokens))
    for part in _blocks(logits):
        result[part] = _nll(log_softmax(logits[part]), tokens[part])
    return result


def mean_kl(baseline: Array, logits: Array) -> float:
    """Mean KL(baseline || model) over all tokens, nats, of logits `[..., vocab]`.

    Memory: 10 MB beside the logits.
    """
    p, q = (a.reshape(-1, a.shape[-1]) for a in (baseline, logits))
    total = sum(float(kl_divergence(log_softmax(p[part]), log_softmax(q[part])).sum()) for part in _blocks(p))
    return total / len(p)


def compare_logits(baseline: Array, logits: Array, tokens: Array) -> TokenDivergence:
    """Compare two models' logits `[N, vocab]` before the tokens `[N]`.

    Memory: 10 MB beside the logits.
    """
    parts = []
    for part in _blocks(logits):
        log_p, log_q = log_softmax(baseline[part]), log_softmax(logits[part])
        top = logits[part].argmax(-1) == baseline[part].argmax(-1)
        kl = kl_divergence(log_p, log_q)
        parts.append(TokenDivergence(_nll(log_q, tokens[part]), _nll(log_p, tokens[part]), kl, top))
    return TokenDivergence.concatenate(parts)


def _nll(log_p: Array, tokens: Array) -> Array:
    return -np.take_along_axis(log_p, tokens[:, None], -1)[:, 0]


def _blocks(logits: Array) -> list[slice]:
    """Rows of `[N, vocab]`, some at a time; one empty slice where there are none."""
    size = max(1, _BLOCK // logits.shape[-1])
    return [slice(start, start + size) for start in range(0, max(1, len(logits)), size)]
