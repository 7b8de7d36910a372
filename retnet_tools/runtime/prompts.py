"""Prompts of one or several lengths, padded on the right and cut into chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retnet_tools.errors import UsageError
from retnet_tools.weights import Array

PREFILL_CHUNK_SIZE = 256
"""Tokens of a prompt that are run at once: on the CPU a tenth faster than 128, from 45 million to 1.3 billion
parameters, and hardly slower than anything larger, which takes more memory (`benchmarks/prefill.py`)."""


@dataclass(frozen=True)
class Chunk:
    """Some tokens of every row.

    Attributes:
        tokens: ids `[B, T]` or embeddings `[B, T, D]`, 0 where padded.
        mask: `[B, T]` int64, 1 at real tokens.
        ends: `[B]` bool, whether the last token of the row is here.
    """

    tokens: Array
    mask: Array
    ends: Array

    @property
    def counts(self) -> Array:
        """Real tokens of each row, `[B]` int64."""
        return np.asarray(self.mask.sum(1))


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts.

    Attributes:
        tokens: ids `[B, T]` int64 or embeddings `[B, T, D]` float32; anything after a row's length is ignored.
        lengths: `[B]` int64, each at least 1.
    """

    tokens: Array
    lengths: Array

    @classmethod
    def of(cls, rows: Array | Sequence[Any], lengths: Any, *, dtype: str, width: tuple[int, ...]) -> Prompts:
        """A batch from rows of any lengths.

        Args:
            rows: `[B, T, *width]`, or one `[T_b, *width]` for each row.
            lengths: how many tokens of each row are real; None takes all.
            dtype: of the tokens.
            width: `()` for ids, `(D,)` for embeddings.

        Raises:
            UsageError: rows of another shape or type, an empty row, lengths that the rows do not have.
        """
        arrays = [_array(row, dtype) for row in rows]
        for i, row in enumerate(arrays):
            if row.size and (row.ndim != 1 + len(width) or row.shape[1:] != width):
                expected = ", ".join(["tokens", *map(str, width)])
                raise UsageError(f"a prompt of shape {list(row.shape)} in row {i}", f"[{expected}]")
        sizes = np.array([len(row) for row in arrays], dtype=np.int64)
        counts = sizes if lengths is None else np.asarray(lengths, dtype=np.int64)
        if counts.shape != sizes.shape or (counts > sizes).any():
            raise UsageError(f"lengths {counts.tolist()}", f"one for each row, at most {sizes.tolist()}")
        if (counts < 1).any():
            raise UsageError(f"an empty prompt in row {int(counts.argmin())}", "at least one token")
        tokens = np.zeros((len(arrays), int(counts.max(initial=0)), *width), dtype=dtype)
        for row, source, count in zip(tokens, arrays, counts, strict=True):
            row[:count] = source[:count]
        return cls(tokens, counts)

    def chunks(self, size: int) -> Iterator[Chunk]:
        """The tokens in order, `size` at a time; the last chunk may be shorter."""
        if size < 1:
            raise UsageError(f"--chunk-size {size}", "at least 1")
        for start in range(0, self.tokens.shape[1], size):
            tokens = self.tokens[:, start : start + size]
            index = start + np.arange(tokens.shape[1])
            mask = (index < self.lengths[:, None]).astype(np.int64)
            ends = (start < self.lengths) & (self.lengths <= start + size)
            yield Chunk(np.ascontiguousarray(tokens), mask, ends)


def _array(row: Any, dtype: str) -> Array:
    """A row as numbers of a type, where no number has to be cut or rounded to an integer."""
    try:
        array = np.asarray(row)
        if not array.size or array.dtype.kind in ("iu" if np.dtype(dtype).kind == "i" else "iuf"):
            return array.astype(dtype, copy=False)
        found = str(array.dtype)
    except ValueError as error:
        found = str(error)
    raise UsageError(f"a prompt of {found}", f"numbers that fit {dtype}")
