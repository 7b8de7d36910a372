"""Choosing the next token from logits."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from retnet_tools.errors import InputError, UsageError
from retnet_tools.weights import Array

_FIRST_RANKED = 256
"""Tokens that are put in order at first; more only where they do not reach top_p."""


@dataclass(frozen=True)
class Sampling:
    """How to choose a token.

    Logits l_i of tokens that the sequence holds already (prompt included) become l_i / r where positive and l_i r where
    negative, with r = `repetition_penalty` (CTRL, arXiv 1909.05858). Then p_i is softmax(l / temperature), restricted
    to the `top_k` most likely tokens (0: all), to the smallest set whose probability reaches `top_p` (1: all), and to
    tokens of at least `min_p` times the probability of the most likely one (0: all). Temperature 0 takes the most
    likely token. Rows draw from streams of their own, so that what a row gets does not depend on its neighbours.

    Raises:
        UsageError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < float("inf")):
            raise UsageError(f"--temperature {self.temperature}", "a number >= 0")
        if self.top_k < 0:
            raise UsageError(f"--top-k {self.top_k}", "0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p}", "a number in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"--min-p {self.min_p}", "a number from 0 to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UsageError(f"--repetition-penalty {self.repetition_penalty}", "a number > 0; 1 changes nothing")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed}", "0 or more")


class SamplingFields(TypedDict, total=False):
    """The fields of `Sampling`, as keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int


class Sampler:
    """Draws tokens for the rows of a batch; the same seed draws the same tokens from the same logits.

    Attributes:
        sampling: how to choose.
        streams: a generator of random numbers for each row.
        seen: `[B, vocab]` bool, the tokens that each row holds; kept for the repetition penalty.
    """

    def __init__(self, sampling: Sampling, streams: Sequence[np.random.Generator], seen: Array) -> None:
        self.sampling, self.streams, self.seen = sampling, list(streams), seen

    @classmethod
    def for_rows(cls, sampling: Sampling, rows: Iterable[int], vocab_size: int) -> Sampler:
        """A sampler for sequences without tokens; a row's number and the seed decide its random numbers."""
        streams = [np.random.Generator(np.random.PCG64([sampling.seed, row])) for row in rows]
        return cls(sampling, streams, np.zeros((len(streams), vocab_size), dtype=np.bool_))

    def observe(self, row: int, tokens: Any) -> None:
        """Note tokens that a row now holds."""
        self.seen[row, tokens] = True

    def select(self, rows: Sequence[int]) -> Sampler:
        """A sampler of these rows. The first copy of a row draws what the row would have drawn; each further one has
        a stream of its own, seeded by the row's stream and the next number that gives one which no other row has.
        """
        taken = {_place(self.streams[row]) for row in rows}
        numbers: dict[int, Iterator[int]] = {}
        streams = []
        for row in rows:
            stream = copy.deepcopy(self.streams[row])
            if row in numbers:
                seeds = (np.random.PCG64([number, *_place(stream)]) for number in numbers[row])
                stream = next(new for new in map(np.random.Generator, seeds) if _place(new) not in taken)
                taken.add(_place(stream))
            numbers.setdefault(row, itertools.count(1))
            streams.append(stream)
        return Sampler(self.sampling, streams, self.seen[np.asarray(rows, dtype=np.int64)])

    def sample(self, logits: Array, rows: Sequence[int] | None = None) -> Array:
        """One token id for each of these rows (None: all) of `[B, vocab]` logits, as int64.

        Raises:
            InputError: logits that are not finite.
        """
        return np.array([self._draw(logits[row], row) for row in (range(len(logits)) if rows is None else rows)])

    def _draw(self, logits: Array, row: int) -> int:
        if not np.isfinite(logits).all():
            raise InputError(
                "the model gives logits that are not finite", "numbers", "look for its cause with retnet-tools inspect"
            )
        logits = penalized(logits, self.seen[row], self.sampling.repetition_penalty)
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        ids, weights = candidates(logits, self.sampling)
        reached = np.cumsum(weights)
        place = np.searchsorted(reached, self.streams[row].random() * reached[-1], side="right")
        return int(ids[min(int(place), len(ids) - 1)])


def _place(stream: np.random.Generator) -> tuple[int, int]:
    """What decides all that a stream will draw."""
    state = stream.bit_generator.state["state"]
    return state["state"], state["inc"]


def penalized(logits: Array, seen: Array, penalty: float) -> Array:
    """`[vocab]` logits with those of seen tokens moved away from being chosen."""
    if penalty == 1:
        return logits
    wide = logits.astype(np.float64)
    return np.where(seen, np.where(wide > 0, wide / penalty, wide * penalty), wide)


def candidates(logits: Array, sampling: Sampling) -> tuple[Array, Array]:
    """Ids that may be drawn from `[vocab]` logits, and their weights in float64, for a temperature above 0."""
    with np.errstate(over="ignore"):
        scaled = (logits.astype(np.float64) - float(logits.max())) / sampling.temperature
    weights = np.exp(scaled)
    ids = np.arange(len(weights))
    if 0 < sampling.top_k < len(weights):
        ids = most_likely(weights, sampling.top_k)
        weights = weights[ids]
    if sampling.top_p < 1:
        total, count = weights.sum(), min(_FIRST_RANKED, len(weights))
        ranked = most_likely(weights, count)
        while count < len(weights) and weights[ranked].sum() < sampling.top_p * total:
            count = min(8 * count, len(weights))
            ranked = most_likely(weights, count)
        # A token stays while the tokens before it have not reached top_p.
        before = np.cumsum(weights[ranked]) - weights[ranked]
        ranked = ranked[before < sampling.top_p * total]
        ids, weights = ids[ranked], weights[ranked]
    kept = weights >= sampling.min_p * weights.max()
    return ids[kept], weights[kept]


def most_likely(weights: Array, count: int) -> Array:
    """Indices of the largest weights, the largest first; of equal ones the lowest index."""
    if count < len(weights):
        least = np.partition(weights, len(weights) - count)[len(weights) - count]
        above = np.flatnonzero(weights > least)
        index = np.concatenate([above, np.flatnonzero(weights == least)[: count - len(above)]])
    else:
        index = np.arange(len(weights))
    return np.asarray(index[np.lexsort((index, -weights[index]))])


def probabilities(logits: Array, sampling: Sampling) -> Array:
    """The distribution that is drawn from, `[B, vocab]` float64, for a temperature above 0; no repetition penalty."""
    result: Array = np.zeros(logits.shape)
    for row, values in zip(result, logits, strict=True):
        ids, weights = candidates(values, sampling)
        row[ids] = weights / weights.sum()
    return result
