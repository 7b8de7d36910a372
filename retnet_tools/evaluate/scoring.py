"""A text run through a model, and a baseline beside it, token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from retnet_tools.distributions import TokenDivergence, compare_logits, token_nll
from retnet_tools.errors import InputError, UsageError
from retnet_tools.evaluate.logits import LogitsSource
from retnet_tools.evaluate.windows import Row, Windows
from retnet_tools.progress import Progress
from retnet_tools.weights import Array

DEFAULT_BATCH = 16
_BLOCK_ELEMENTS = 1 << 22
_LONGEST_BLOCK = 128
_COLUMNS = ("index", "row", "context", "scored", "apart", "nll")


@dataclass(frozen=True)
class PredictedTokens:
    """Predictions, one entry each, `[N]`, ordered by row and place.

    Attributes:
        index: which token of the text was predicted.
        row: in which row.
        context: how many tokens of the row were seen before it, 1 or more.
        scored: whether it counts (see `Windows`).
        apart: whether its row is one of those that do not overlap.
        nll: -ln p(token), nats.
        divergence: from the baseline, or None.
    """

    index: Array
    row: Array
    context: Array
    scored: Array
    apart: Array
    nll: Array
    divergence: TokenDivergence | None

    def __getitem__(self, chosen: Array) -> PredictedTokens:
        """Some of them, by index or mask."""
        columns = {name: getattr(self, name)[chosen] for name in _COLUMNS}
        return PredictedTokens(**columns, divergence=None if self.divergence is None else self.divergence[chosen])

    @classmethod
    def concatenate(cls, parts: Sequence[PredictedTokens]) -> PredictedTokens:
        """Predictions of several blocks, put in order."""
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS}
        divergences = [part.divergence for part in parts if part.divergence is not None]
        joined = cls(**columns, divergence=TokenDivergence.concatenate(divergences) if divergences else None)
        return joined[np.lexsort((joined.context, joined.row))]


@dataclass(frozen=True)
class Scoring:
    """What a run gave.

    Attributes:
        rows: how many there were.
        fed: tokens that the model was fed, a token in two rows counted twice.
        seconds: that the model took for them, without the baseline and the statistics.
    """

    tokens: PredictedTokens
    rows: int
    fed: int
    seconds: float


def score_text(
    source: LogitsSource,
    ids: Array,
    windows: Windows,
    *,
    baseline: LogitsSource | None = None,
    batch: int = DEFAULT_BATCH,
    all_positions: bool = False,
    progress: Progress | None = None,
) -> Scoring:
    """Predict the tokens of a text `[N]` with a model and, on the same rows at the same time, with a baseline.

    Memory: for each model its states of `batch` rows and one block of logits (16 MB, or one token of every row where
    that is more); for each kept prediction 42 bytes, 67 with a baseline, and as much again while they are put in order.

    Args:
        batch: rows fed side by side.
        all_positions: keep, beside the scored predictions, every prediction of the rows that do not overlap.
        progress: called with what was found so far, tokens done, and tokens in all.

    Raises:
        UsageError: a text too short for the windows, or a batch below 1.
        InputError: logits that are not finite.
    """
    if batch < 1:
        raise UsageError(f"--batch {batch}", "at least 1")
    rows = list(windows.rows(len(ids)))
    total, done = sum(row.length for row in rows), 0
    clock, mean, parts = _Clock(), _RunningMean(), list[PredictedTokens]()
    for first in range(0, len(rows), batch):
        group = _Group(ids, rows[first : first + batch], first, all_positions)
        for start, logits, base in _blocks(group.inputs, source, baseline, clock):
            part = group.predictions(start, logits, base, source, baseline)
            parts.append(part)
            mean.add(part.nll[part.scored])
            done += group.real_tokens(start, logits.shape[1])
            if progress is not None:
                progress(f"tokens, {mean}", done, total)
    return Scoring(PredictedTokens.concatenate(parts), len(rows), total, clock.seconds)


def _blocks(
    inputs: Array, source: LogitsSource, baseline: LogitsSource | None, clock: _Clock
) -> Iterator[tuple[int, Array, Array | None]]:
    """Where a block begins in the rows, the model's logits `[B, n, vocab]` and the baseline's."""
    size = min(max(_BLOCK_ELEMENTS // (len(inputs) * source.vocab_size), 1), _LONGEST_BLOCK)
    theirs = None if baseline is None else baseline.stream(inputs, size)
    start = 0
    for logits in clock.timed(source.stream(inputs, size)):
        yield start, logits, None if theirs is None else next(theirs)
        start += logits.shape[1]


class _Group:
    """Rows fed side by side, padded on the right with token 0, which no earlier prediction sees."""

    def __init__(self, ids: Array, rows: Sequence[Row], first: int, all_positions: bool) -> None:
        self.ids, self.first, self.all_positions = ids, first, all_positions
        self.starts, self.lengths, self.skipped, self.apart = (
            np.array([getattr(row, name) for row in rows]) for name in ("start", "length", "skipped", "apart")
        )
        self.inputs = np.zeros((len(rows), int(self.lengths.max())), dtype=np.int64)
        for line, row in zip(self.inputs, rows, strict=True):
            line[: row.length] = ids[row.start : row.start + row.length]

    def real_tokens(self, start: int, size: int) -> int:
        """Tokens of all rows in a block, without padding."""
        return int(np.clip(self.lengths - start, 0, size).sum())

    def predictions(
        self, start: int, logits: Array, base: Array | None, source: LogitsSource, baseline: LogitsSource | None
    ) -> PredictedTokens:
        """What counts among the predictions of a block that begins at a place in the rows."""
        place = start + np.arange(logits.shape[1])
        real = place < self.lengths[:, None]  # [B, n]
        scored = real & (place >= self.skipped[:, None])
        kept = scored | (real & self.apart[:, None]) if self.all_positions else scored
        row, column = np.nonzero(kept)
        index = self.starts[row] + start + column + 1
        tokens = self.ids[index]
        q, divergence = _finite(logits[row, column], index, source), None
        if base is not None and baseline is not None:
            divergence = compare_logits(_finite(base[row, column], index, baseline), q, tokens)
        return PredictedTokens(
            index=index,
            row=self.first + row,
            context=start + column + 1,
            scored=scored[row, column],
            apart=self.apart[row],
            nll=token_nll(q, tokens) if divergence is None else divergence.nll,
            divergence=divergence,
        )


class _Clock:
    """Sums up the seconds that iterators take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, blocks: Iterator[Array]) -> Iterator[Array]:
        """The same blocks."""
        began = time.perf_counter()
        for block in blocks:
            self.seconds += time.perf_counter() - began
            yield block
            began = time.perf_counter()


class _RunningMean:
    """The mean NLL so far, in words."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, nll: Array) -> None:
        """Add `[N]` tokens."""
        self.total, self.count = self.total + float(nll.sum()), self.count + len(nll)

    def __str__(self) -> str:
        return f"mean NLL {self.total / self.count:.4f}" if self.count else "reading context"


def _finite(logits: Array, index: Array, source: LogitsSource) -> Array:
    good = np.isfinite(logits).all(-1)
    if not good.all():
        raise InputError(
            f"{source.name} gives logits that are not finite before token {int(index[~good].min())} of the text",
            "numbers",
            "look for the cause with retnet-tools inspect, or take a wider --dtype",
        )
    return logits
