"""Generation: prompts in, tokens and text out, for a batch at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from numbers import Integral
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from retnet_tools.errors import UsageError
from retnet_tools.graph.contract import MAX_POSITION
from retnet_tools.runtime.codec import Codec, IdStream, StopMatcher, TextStream
from retnet_tools.runtime.prompts import PREFILL_CHUNK_SIZE
from retnet_tools.runtime.sampling import Sampling
from retnet_tools.runtime.sequences import Sequences
from retnet_tools.runtime.session import DecoderSession

StopReason = Literal["end-of-text", "stop-string", "length"]
OnToken = Callable[[int, int | None, str], None]
Prompts = Sequence[Sequence[int]]
"""Token ids for each row."""
_UNFED: tuple[StopReason, ...] = ("end-of-text",)
"""Reasons whose last token is not fed."""


class Piece(NamedTuple):
    """A token as it is chosen, and the text that became certain with it.

    Attributes:
        row: of the batch.
        token: None where only text that was held back for a stop string comes free.
        text: empty without a codec, and within a character that spans tokens.
    """

    row: int
    token: int | None
    text: str


@dataclass(frozen=True)
class Stopping:
    """When a sequence ends.

    Attributes:
        max_tokens: after so many tokens.
        end_ids: at a token that ends the text; it is not part of the result.
        strings: where its text comes to hold one of these; the text is cut before it. Needs a codec.

    Raises:
        UsageError: `max_tokens` below 1, an empty string.
    """

    max_tokens: int = 128
    end_ids: Collection[int] = ()
    strings: Collection[str] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.max_tokens, Integral) or self.max_tokens < 1:
            raise UsageError(f"--max-tokens {self.max_tokens!r}", "at least 1")
        StopMatcher(self.strings)


@dataclass(frozen=True)
class Generation:
    """What one sequence got.

    Attributes:
        tokens: without the prompt and without the token that ended the text.
        text: of these tokens, cut before a stop string; empty without a codec.
        stop_reason: `end-of-text`, `stop-string` or `length`.
    """

    tokens: tuple[int, ...]
    text: str
    stop_reason: StopReason


@dataclass(frozen=True)
class Generations:
    """What a batch got, and how fast.

    Attributes:
        rows: one for each sequence: the samples of the first prompt, then those of the second, and so on.
        prompt_tokens: of all prompts together; a prompt with several samples is read once.
        prompt_seconds: until the logits after the prompts were there.
        decode_seconds: from then to the end.
        sequences: the rows after their last token, ready to go on; None unless asked for.
    """

    rows: tuple[Generation, ...]
    prompt_tokens: int
    prompt_seconds: float
    decode_seconds: float
    sequences: Sequences | None = None

    @property
    def prompt_tokens_per_second(self) -> float:
        """Of reading the prompts."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_tokens else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Rate of generating, over the tokens that a step was run for: not the first of a row."""
        steps = sum(max(len(row.tokens) - (row.stop_reason != "end-of-text"), 0) for row in self.rows)
        return steps / self.decode_seconds if steps else 0.0


@dataclass
class _Row:
    """A sequence while it grows."""

    number: int
    stream: TextStream | IdStream | None
    matcher: StopMatcher
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: StopReason | None = None

    def take(self, token: int, stopping: Stopping) -> Piece | None:
        """Add a token, or end at it."""
        piece = ""
        if token in stopping.end_ids:
            self.reason = "end-of-text"
        else:
            self.tokens.append(token)
            if self.stream is not None:
                piece, complete = self.matcher.push(self.stream.push(token))
                self.reason = "stop-string" if complete else None
            if self.reason is None and len(self.tokens) == stopping.max_tokens:
                self.reason = "length"
        if self.reason is not None:
            piece += self.matcher.rest()
        self.text += piece
        ended = self.reason == "end-of-text"
        return None if ended and not piece else Piece(self.number, None if ended else token, piece)


def generate(
    session: DecoderSession,
    prompts: Prompts,
    *,
    max_tokens: int = 128,
    sampling: Sampling | None = None,
    samples: int = 1,
    codec: Codec | None = None,
    stop: Collection[str] = (),
    end_ids: Collection[int] | None = None,
    on_token: OnToken | None = None,
    chunk_size: int = PREFILL_CHUNK_SIZE,
) -> Generations:
    """Continue each prompt until it ends; all run as one batch, and a row that has ended is dropped from it.

    Args:
        session: an opened export.
        prompts: token ids of each, of any lengths.
        max_tokens: for each sequence.
        sampling: how to choose; None takes the most likely tokens.
        samples: sequences for each prompt, which is read once and its state forked.
        codec: turns tokens into text; None leaves the text empty.
        stop: strings that end a text; need a codec.
        end_ids: tokens that end a text; None takes the codec's.
        on_token: called with the parts of each `Piece` as it comes.
        chunk_size: tokens of the prompts to run at once.

    Raises:
        UsageError: an empty prompt, a token outside the vocabulary, a number below 1, stop strings without a codec.
        InputError: logits that are not finite.
    """
    ids = (codec.end_ids if codec is not None else ()) if end_ids is None else end_ids
    stopping = Stopping(max_tokens, frozenset(ids), tuple(stop))
    sequences = Sequences.start(session, len(prompts), sampling)
    return generate_from(
        sequences, prompts, stopping, samples=samples, codec=codec, on_token=on_token, chunk_size=chunk_size
    )


def generate_from(
    sequences: Sequences,
    prompts: Prompts,
    stopping: Stopping,
    *,
    samples: int = 1,
    codec: Codec | None = None,
    on_token: OnToken | None = None,
    chunk_size: int = PREFILL_CHUNK_SIZE,
    keep: bool = False,
) -> Generations:
    """Feed a prompt to each sequence and continue it, as `generate` does; arguments and errors of `stream_from`."""
    pieces = stream_from(sequences, prompts, stopping, samples=samples, codec=codec, chunk_size=chunk_size, keep=keep)
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            result: Generations = end.value
            return result
        if on_token is not None:
            on_token(*piece)


def stream_from(
    sequences: Sequences,
    prompts: Prompts,
    stopping: Stopping,
    *,
    samples: int = 1,
    codec: Codec | None = None,
    chunk_size: int = PREFILL_CHUNK_SIZE,
    keep: bool = False,
) -> Generator[Piece, None, Generations]:
    """What `generate_from` does, piece by piece: nothing runs before the next piece is asked for.

    Args:
        sequences: used up.
        prompts: token ids for each row; none at all where the rows hold tokens already and go on from there.
        keep: return the sequences after their last token.

    Raises:
        UsageError: as `generate`, at once.
        InputError: as `generate`, with the piece that cannot be had.
    """
    if samples < 1:
        raise UsageError(f"--samples {samples}", "at least 1")
    if stopping.strings and codec is None:
        raise UsageError("stop strings without a codec", "a codec, to know the text")
    prompts = list(prompts)
    if not all(hasattr(prompt, "__len__") for prompt in prompts):
        raise UsageError("a prompt that is one number", "token ids for each row")
    lengths = list(map(len, prompts))
    starts = sequences.state.position.tolist()
    longest = max(map(sum, zip_longest(starts, lengths, fillvalue=0))) + stopping.max_tokens
    if longest > MAX_POSITION + 1:
        raise UsageError(f"a sequence of {longest} tokens", f"at most {MAX_POSITION + 1}", "lower --max-tokens")
    if max(lengths, default=0) > 1:
        sequences.session.open_prefill()
    return _stream(sequences, prompts, stopping, samples, codec, chunk_size, keep)


def _stream(
    sequences: Sequences, prompts: Prompts, stopping: Stopping, samples: int, codec: Codec | None, size: int, keep: bool
) -> Generator[Piece, None, Generations]:
    """Read the prompts, then sample and step until every row has ended."""
    began = time.perf_counter()
    if prompts:
        sequences.feed(prompts, chunk_size=size)
    if samples > 1:
        sequences = sequences.select([row for row in range(sequences.batch) for _ in range(samples)])
    prefilled = time.perf_counter()
    rows = [
        _Row(number, codec.stream() if codec is not None else None, StopMatcher(stopping.strings))
        for number in range(sequences.batch)
    ]
    batch, parked = _Batch(sequences, list(rows)), dict[int, Sequences]()
    while batch.rows:
        tokens = batch.sample()
        for row, token in zip(batch.rows, tokens, strict=True):
            if row.reason is None and (piece := row.take(int(token), stopping)) is not None:
                yield piece
        # The token that ended a text is not fed, every other is.
        tokens = batch.park(parked, tokens, _UNFED) if keep else batch.shrink(tokens)
        if batch.rows:
            batch.sequences.append(tokens)
        if keep:
            batch.park(parked, tokens, get_args(StopReason))
    results = tuple(Generation(tuple(row.tokens), row.text, row.reason or "length") for row in rows)
    kept = Sequences.join([parked[row.number] for row in rows]) if keep else None
    return Generations(results, sum(map(len, prompts)), prefilled - began, time.perf_counter() - prefilled, kept)


@dataclass
class _Batch:
    """The rows that are stepped together."""

    sequences: Sequences
    rows: list[_Row]

    def sample(self) -> Any:
        """The next token of each row, 0 for one that has ended."""
        live = self._live()
        tokens = np.zeros(len(self.rows), dtype=np.int64)
        tokens[live] = self.sequences.sample(live)
        return tokens

    def shrink(self, tokens: Any) -> Any:
        """Leave out rows that have ended once they are half of the batch: leaving out copies the states."""
        live = self._live()
        # What has ended is stepped along until then, and no further than it had room for.
        return self._keep(live, tokens) if 2 * len(live) <= len(self.rows) else tokens

    def park(self, parked: dict[int, Sequences], tokens: Any, reasons: Collection[StopReason]) -> Any:
        """Move rows that ended for these reasons out of the batch as they are now."""
        for i, row in enumerate(self.rows):
            if row.reason in reasons:
                parked[row.number] = self.sequences.select([i])
        return self._keep([i for i, row in enumerate(self.rows) if row.reason not in reasons], tokens)

    def _live(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row.reason is None]

    def _keep(self, indices: list[int], tokens: Any) -> Any:
        if indices and len(indices) < len(self.rows):
            self.sequences = self.sequences.select(indices)
        self.rows = [self.rows[i] for i in indices]
        return tokens[indices]
