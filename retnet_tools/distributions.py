"""Distributions over the next token, from logits, in float64: log-softmax, surprise, Kullback-Leibler divergence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np

from retnet_tools.weights import Array

_BLOCK = 1 << 18
"""Logits that are worked on at a time: five float64 copies of them take 10 MB."""


class TokenTable(SimpleNamespace):
    """Figures of N tokens, a column `[N]` each under its name: `table.nll`."""

    def __getitem__(self, chosen: Array | slice) -> TokenTable:
        """Some of the tokens, by index or mask."""
        return TokenTable(**{name: column[chosen] for name, column in vars(self).items()})

    @classmethod
    def concatenate(cls, parts: Sequence[TokenTable]) -> TokenTable:
        """Tokens of several calls that have the same columns, in order."""
        return cls(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})


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
        result[part] = -_of_tokens(log_softmax(logits[part]), tokens[part])
    return result


def mean_kl(baseline: Array, logits: Array) -> float:
    """Mean KL(baseline || model) over all tokens, nats, of logits `[..., vocab]`.

    Memory: 10 MB beside the logits.
    """
    p, q = (a.reshape(-1, a.shape[-1]) for a in (baseline, logits))
    total = sum(float(kl_divergence(log_softmax(p[part]), log_softmax(q[part])).sum()) for part in _blocks(p))
    return total / len(p)


TokenFigure = Callable[[Array, Array, Array], Array]
"""A figure `[N]` of a baseline's and a model's log-probabilities `[N, vocab]` before the tokens `[N]`."""

TOKEN_FIGURES: dict[str, TokenFigure] = {
    "nll": lambda base, model, tokens: -_of_tokens(model, tokens),
    "baseline_nll": lambda base, model, tokens: -_of_tokens(base, tokens),
    "delta_p": lambda base, model, tokens: np.exp(_of_tokens(model, tokens)) - np.exp(_of_tokens(base, tokens)),
    "kl": lambda base, model, tokens: kl_divergence(base, model),
    "same_top": lambda base, model, tokens: base.argmax(-1) == model.argmax(-1),
}
"""What a model and a baseline are compared by, token by token, in nats and parts of 1; every row is a column."""


def compare_logits(baseline: Array, logits: Array, tokens: Array) -> TokenTable:
    """Compare two models' logits `[N, vocab]` before the tokens `[N]`: a column for each of `TOKEN_FIGURES`.

    Memory: 10 MB beside the logits.
    """
    parts = []
    for part in _blocks(logits):
        compared = log_softmax(baseline[part]), log_softmax(logits[part]), tokens[part]
        parts.append(TokenTable(**{name: figure(*compared) for name, figure in TOKEN_FIGURES.items()}))
    return TokenTable.concatenate(parts)


def _of_tokens(log_p: Array, tokens: Array) -> Array:
    return np.take_along_axis(log_p, tokens[:, None], -1)[:, 0]


def _blocks(logits: Array) -> list[slice]:
    """Rows of `[N, vocab]`, some at a time; one empty slice where there are none."""
    size = max(1, _BLOCK // logits.shape[-1])
    return [slice(start, start + size) for start in range(0, max(1, len(logits)), size)]
