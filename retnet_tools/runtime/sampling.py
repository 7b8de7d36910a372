"""Choosing the next token from logits: a list of steps, each of which changes logits or leaves tokens out, then a draw.

A step is a function `Candidates -> Candidates`. Steps of one's own are given as `Sampling(steps=...)`.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from numbers import Real
from typing import Any, TypedDict

import numpy as np

from retnet_tools.errors import InputError, UsageError
from retnet_tools.weights import Array

_FIRST_RANKED = 256
"""Tokens that are put in order at first; more only where they do not reach top_p."""


@dataclass(frozen=True)
class Candidates:
    """The tokens that one sequence may go on with, in the order in which a draw walks through them.

    Attributes:
        ids: `[N]` int64.
        logits: `[N]`, of these tokens.
        seen: `[vocab]` bool, the tokens that the sequence holds already, prompt included.
    """

    ids: Array
    logits: Array
    seen: Array

    @classmethod
    def all(cls, logits: Array, seen: Array) -> Candidates:
        """Every token of the vocabulary."""
        return cls(_token_ids(len(logits)), logits, seen)

    @cached_property
    def weights(self) -> Array:
        """`[N]` float64, exp(l) but for a factor that all have: probabilities but for their sum."""
        wide = np.asarray(self.logits, dtype=np.float64)
        return np.asarray(np.exp(wide - wide.max()))

    @property
    def are_seen(self) -> Array:
        """`[N]` bool, whether the sequence holds each of these tokens."""
        return self.seen if self.ids is _token_ids(len(self.seen)) else np.asarray(self.seen[self.ids])

    def keep(self, index: Array) -> Candidates:
        """Those at these places, or where a mask is true."""
        kept = Candidates(self.ids[index], self.logits[index], self.seen)
        if "weights" in vars(self):
            vars(kept)["weights"] = self.weights[index]
        return kept


@lru_cache(maxsize=4)
def _token_ids(count: int) -> Array:
    ids = np.arange(count)
    ids.flags.writeable = False
    return ids


Step = Callable[[Candidates], Candidates]


def repetition_penalty(candidates: Candidates, penalty: float) -> Candidates:
    """Logits of tokens that are there already become l / r where positive and l r where negative (arXiv 1909.05858)."""
    wide = np.asarray(candidates.logits, dtype=np.float64)
    moved = np.where(candidates.are_seen, np.where(wide > 0, wide / penalty, wide * penalty), wide)
    return Candidates(candidates.ids, moved, candidates.seen)


def temperature(candidates: Candidates, value: float) -> Candidates:
    """(l - max l) / T: probabilities to the power of 1 / T."""
    with np.errstate(over="ignore"):
        scaled = (np.asarray(candidates.logits, dtype=np.float64) - float(candidates.logits.max())) / value
    cooled = Candidates(candidates.ids, scaled, candidates.seen)
    vars(cooled)["weights"] = np.exp(scaled)
    return cooled


def top_k(candidates: Candidates, count: int) -> Candidates:
    """The most likely tokens, the most likely first."""
    return candidates.keep(most_likely(candidates.weights, count)) if count < len(candidates.ids) else candidates


def top_p(candidates: Candidates, share: float) -> Candidates:
    """The smallest set of tokens whose probability reaches a share, the most likely first."""
    weights = candidates.weights
    total, count = weights.sum(), min(_FIRST_RANKED, len(weights))
    ranked = most_likely(weights, count)
    while count < len(weights) and weights[ranked].sum() < share * total:
        count = min(8 * count, len(weights))
        ranked = most_likely(weights, count)
    # A token stays while the tokens before it have not reached the share.
    before = np.cumsum(weights[ranked]) - weights[ranked]
    return candidates.keep(ranked[before < share * total])


def min_p(candidates: Candidates, share: float) -> Candidates:
    """Tokens of at least this share of the probability of the most likely one."""
    return candidates.keep(candidates.weights >= share * candidates.weights.max())


@dataclass(frozen=True)
class Sampling:
    """How to choose a token.

    Logits go through `repetition_penalty` (1 changes nothing) and `steps`, of one's own; `temperature` 0 takes the most
    likely token then, else they go on through `top_k` (0: all), `top_p` (1: all) and `min_p` (0: all), and p_i is the
    softmax of what is left. Rows draw from streams of their own, so that what a row gets does not depend on its
    neighbours.

    Raises:
        UsageError: no number, or one out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        for name, value in self.settings().items():
            if not isinstance(value, Real):
                raise UsageError(f"--{name.replace('_', '-')} {value!r}", "a number")
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

    def candidates(self, logits: Array, seen: Array) -> Candidates:
        """What is left of `[vocab]` logits after every step, for a sequence that holds the tokens `seen`."""
        left = Candidates.all(logits, seen)
        for step in self._chain:
            left = step(left)
        if not len(left.ids):
            raise UsageError("a sampling step that leaves no token", "at least one")
        return left

    @cached_property
    def _chain(self) -> tuple[Step, ...]:
        drawn = (
            (partial(temperature, value=self.temperature), True),
            (partial(top_k, count=self.top_k), self.top_k > 0),
            (partial(top_p, share=self.top_p), self.top_p < 1),
            (partial(min_p, share=self.min_p), self.min_p > 0),
        )
        penalty = partial(repetition_penalty, penalty=self.repetition_penalty)
        return (
            *([penalty] if self.repetition_penalty != 1 else ()),
            *self.steps,
            *(step for step, used in drawn if used and self.temperature > 0),
        )

    def settings(self) -> dict[str, Any]:
        """The numbers, by name, without steps of one's own."""
        names = (field.name for field in dataclasses.fields(self) if field.name != "steps")
        return {name: getattr(self, name) for name in names}


class SamplingFields(TypedDict, total=False):
    """The fields of `Sampling`, as keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    steps: tuple[Step, ...]


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
        candidates = self.sampling.candidates(logits, self.seen[row])
        if self.sampling.temperature == 0:
            return int(candidates.ids[candidates.logits.argmax()])
        reached = np.cumsum(candidates.weights)
        place = np.searchsorted(reached, self.streams[row].random() * reached[-1], side="right")
        return int(candidates.ids[min(int(place), len(reached) - 1)])


def _place(stream: np.random.Generator) -> tuple[int, int]:
    """What decides all that a stream will draw."""
    state = stream.bit_generator.state["state"]
    return state["state"], state["inc"]


def most_likely(weights: Array, count: int) -> Array:
    """Indices of the largest weights, the largest first; of equal ones the lowest index."""
    if count < len(weights):
        least = np.partition(weights, len(weights) - count)[len(weights) - count]
        above = np.flatnonzero(weights > least)
        index = np.concatenate([above, np.flatnonzero(weights == least)[: count - len(above)]])
    else:
        index = np.arange(len(weights))
    return np.asarray(index[np.lexsort((index, -weights[index]))])
