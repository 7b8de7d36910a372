"""A text run through a model, and a baseline beside it: which tokens of it are fed together, which predictions count,
and what each of them gave."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from retnet_tools.distributions import TokenTable, compare_logits, token_nll
from retnet_tools.errors import InputError, UsageError
from retnet_tools.evaluate.logits import LogitsSource
from retnet_tools.progress import Progress, no_progress
from retnet_tools.weights import Array

DEFAULT_BATCH = 16
DEFAULT_CONTEXT = 512
_BLOCK_ELEMENTS = 1 << 24
_LONGEST_BLOCK = 256


@dataclass(frozen=True)
class Row:
    """Tokens `start` to `start + length - 1` of the text, fed as one sequence from zero states.

    After each of them the next token of the text is predicted: `length` predictions, of tokens `start + 1` to
    `start + length`. Those after the first `skipped` are scored; all have more than `skipped` tokens of context.

    Attributes:
        apart: whether this row is one of those that do not overlap, from which figures by position are taken.
    """

    start: int
    length: int
    skipped: int
    apart: bool


@dataclass(frozen=True)
class Windows:
    """A text cut into rows of `context` tokens, each `stride` further on than the one before.

    Row k feeds tokens k stride to k stride + context - 1 and its last `stride` predictions are scored. So of a text
    t_0 ... t_(N-1) the tokens from t_(context - stride + 1) on are scored, each exactly once, each seen with at least
    context - stride + 1 and at most `context` tokens before it; what comes earlier serves as context alone. The last
    row ends with the text and may be shorter.

    Attributes:
        context: tokens fed in a row; 0 feeds the whole text as one row, every token but the first being scored.
        stride: None is half the context, as llama-perplexity scores the second half; `context` scores everything
            but t_0, with as little as one token of context.

    Raises:
        UsageError: a number out of range.
    """

    context: int = DEFAULT_CONTEXT
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.context < 0:
            raise UsageError(f"--context {self.context}", "at least 1, or 0 for the whole text in one row")
        if self.stride is not None and self.context == 0:
            raise UsageError(f"--stride {self.stride} with --context 0", "no stride where all is one row")
        if self.stride is not None and not 1 <= self.stride <= self.context:
            raise UsageError(f"--stride {self.stride}", f"1 to {self.context}, the context")

    def sizes(self, tokens: int) -> tuple[int, int]:
        """Context and stride for a text of so many tokens."""
        context = self.context or max(1, tokens - 1)
        half = max(1, context // 2) if self.context else context
        return context, self.stride or half

    def rows(self, tokens: int) -> Iterator[Row]:
        """The rows of a text of `tokens` tokens.

        Raises:
            UsageError: a text so short that no token would be scored.
        """
        context, stride = self.sizes(tokens)
        skipped = context - stride
        if tokens < skipped + 2:
            raise UsageError(
                f"a text of {tokens} token{'' if tokens == 1 else 's'}",
                f"at least {skipped + 2}, so that one has {skipped + 1} before it",
                "take a longer text, a smaller --context or --context 0" if skipped else "take a longer text",
            )
        every = -(-context // stride)
        for k in range(-(-(tokens - 1 - skipped) // stride)):
            start = k * stride
            yield Row(start, min(context, tokens - 1 - start), skipped, k % every == 0)


@dataclass(frozen=True)
class Scoring:
    """What a run gave.

    Attributes:
        tokens: the predictions, ordered by row and place, with these columns: `index`, which token of the text was
            predicted; `row`, in which row; `context`, how many tokens of the row were seen before it, 1 or more;
            `scored`, whether it counts; `apart`, whether its row is one of those that do not overlap; `nll`, -ln p of
            the token in nats; and with a baseline the others of `retnet_tools.distributions.TOKEN_FIGURES`.
        rows: how many there were.
        fed: tokens that the model was fed, a token in two rows counted twice.
        seconds: that the model took for them, without the baseline and the statistics.
    """

    tokens: TokenTable
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
    progress: Progress = no_progress,
) -> Scoring:
    """Predict the tokens of a text `[N]` with a model and, on the same rows at the same time, with a baseline.

    Memory: for each model its states of `batch` rows and one block of logits (64 MB, or one token of every row where
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
    clock, parts, nll, scored = _Clock(), list[TokenTable](), 0.0, 0
    for first in range(0, len(rows), batch):
        group = _Group(ids, rows[first : first + batch], first, all_positions)
        for start, logits, base in _blocks(group.inputs, source, baseline, clock):
            part = group.predictions(start, logits, base, source, baseline)
            parts.append(part)
            done += group.real_tokens(start, logits.shape[1])
            nll, scored = nll + float(part.nll[part.scored].sum()), scored + int(part.scored.sum())
            progress(f"tokens, mean NLL {nll / scored:.4f}" if scored else "tokens, reading context", done, total)
    tokens = TokenTable.concatenate(parts)
    return Scoring(tokens[np.lexsort((tokens.context, tokens.row))], len(rows), total, clock.seconds)


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
    ) -> TokenTable:
        """What counts among the predictions of a block that begins at a place in the rows."""
        place = start + np.arange(logits.shape[1])
        real = place < self.lengths[:, None]  # [B, n]
        scored = real & (place >= self.skipped[:, None])
        kept = scored | (real & self.apart[:, None]) if self.all_positions else scored
        row, column = np.nonzero(kept)
        index = self.starts[row] + start + column + 1
        tokens = self.ids[index]
        q = _finite(logits[row, column], index, source)
        if base is None or baseline is None:
            figures = TokenTable(nll=token_nll(q, tokens))
        else:
            figures = compare_logits(_finite(base[row, column], index, baseline), q, tokens)
        return TokenTable(
            index=index,
            row=self.first + row,
            context=start + column + 1,
            scored=scored[row, column],
            apart=self.apart[row],
            **vars(figures),
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


def _finite(logits: Array, index: Array, source: LogitsSource) -> Array:
    good = np.isfinite(logits).all(-1)
    if not good.all():
        raise InputError(
            f"{source.name} gives logits that are not finite before token {int(index[~good].min())} of the text",
            "numbers",
            "look for the cause with retnet-tools inspect, or take a wider --dtype",
        )
    return logits
