"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retnet_tools.errors import InputError, UsageError
from retnet_tools.weights import Array


@dataclass(frozen=True)
class Sampling:
    """How to choose a token.

    p_i is softmax(logits / temperature), restricted to the `top_k` most likely tokens (0: all) and then to the
    smallest set whose probability reaches `top_p` (1: all). Temperature 0 takes the most likely token.

    Raises:
        UsageError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < float("inf")):
            raise UsageError(f"--temperature {self.temperature}", "a number >= 0")
        if self.top_k < 0:
            raise UsageError(f"--top-k {self.top_k}", "0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p}", "a number in (0, 1]")


class Sampler:
    """Draws tokens; the same seed draws the same tokens from the same logits."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def sample(self, logits: Array) -> Array:
        """One token id for each row of `[B, vocab]` logits, as `[B]` int64.

        Raises:
            InputError: logits that are not finite.
        """
        if not np.isfinite(logits).all():
            raise InputError(
                "the model gives logits that are not finite", "numbers", "look for its cause with retnet-tools inspect"
            )
        if self.sampling.temperature == 0:
            return np.asarray(logits.argmax(-1), dtype=np.int64)
        return np.array([self._random.choice(len(p), p=p) for p in probabilities(logits, self.sampling)])


def probabilities(logits: Array, sampling: Sampling) -> Array:
    """The distribution that is drawn from, `[B, vocab]` float64, for a temperature above 0."""
    distance = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    with np.errstate(over="ignore"):
        scaled = distance / sampling.temperature
    order = np.argsort(-scaled, axis=-1, kind="stable")
    ranked = np.take_along_axis(scaled, order, -1)
    weights = np.exp(ranked)
    if 0 < sampling.top_k < weights.shape[-1]:
        weights[:, sampling.top_k :] = 0
    weights /= weights.sum(-1, keepdims=True)
    # A token stays while the tokens before it have not reached top_p.
    weights[np.cumsum(weights, -1) - weights >= sampling.top_p] = 0
    weights /= weights.sum(-1, keepdims=True)
    result: Array = np.zeros_like(weights)
    np.put_along_axis(result, order, weights, -1)
    return result
