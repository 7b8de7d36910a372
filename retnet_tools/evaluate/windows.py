"""Which tokens of a text are fed together, and which predictions count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from retnet_tools.errors import UsageError

DEFAULT_CONTEXT = 512


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
