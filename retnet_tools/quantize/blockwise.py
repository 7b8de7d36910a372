"""Matrices as codes, scales and zero points: w = (code - zero_point) * scale, a block of neighbours along K at a time.

The scale of a block is chosen by least squared error. For given codes q (zero point subtracted) the best scale is
r = sum(w q) / sum(q q), and what remains is sum(w w) - sum(w q)^2 / sum(q q): so each of a few ways to place the
codes is tried, and the one with the largest sum(w q)^2 / sum(q q) is kept, with its r.

Rows do not depend on one another: a matrix may come in pieces of any number of rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np

from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.weights import Array

_SHRINKS = tuple(product((1.0, 0.92, 0.84), repeat=2))
"""Parts of an asymmetric block's range, below and above zero, that are spread over the codes; the rest is clipped."""
_CHUNK = 1 << 17
"""Weights looked at together: small enough for the cache."""
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class QuantizedRows:
    """Some rows of a matrix, not yet packed: codes `[N, K]` uint8, 0 to 2^bits - 1; scales `[N, blocks]` in the type in
    which they are stored; zero points `[N, blocks]` uint8, or None for a symmetric format.
    """

    codes: Array
    scales: Array
    zero_points: Array | None


def quantize_rows(weight: Array, format: BlockFormat, scale_type: np.dtype[Any]) -> QuantizedRows:
    """Round to nearest, with scales of least squared error.

    Args:
        weight: `[N, K]`, finite.
        scale_type: float32, float16 or bfloat16; codes are chosen for the scale as it is rounded to it.
    """
    rows, columns = weight.shape
    blocks, size = format.blocks(columns), format.block_size
    padded = np.zeros((rows, blocks * size), dtype=np.float32)
    padded[:, :columns] = weight
    flat = padded.reshape(-1, size)
    codes = np.empty(flat.shape, dtype=np.uint8)
    scales = np.empty(len(flat), dtype=scale_type)
    zeros = np.full(len(flat), format.middle, dtype=np.uint8)
    search = _search_symmetric if format.symmetric else _search_asymmetric

    def quantize_chunk(start: int) -> None:
        part = slice(start, start + _CHUNK // size)
        weights = np.ascontiguousarray(flat[part].T)  # [block, blocks]
        scale, zeros[part] = search(weights, format)
        scales[part] = _stored(scale, scale_type)
        codes[part] = _encode(weights, scales[part], zeros[part], format).T

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(quantize_chunk, range(0, len(flat), _CHUNK // size)):
            pass
    return QuantizedRows(
        codes.reshape(rows, -1)[:, :columns],
        scales.reshape(rows, blocks),
        None if format.symmetric else zeros.reshape(rows, blocks),
    )


def dequantize_rows(rows: QuantizedRows, format: BlockFormat) -> Array:
    """(code - zero_point) * scale, `[N, K]` float32."""
    columns = rows.codes.shape[1]
    zeros = np.float32(format.middle) if rows.zero_points is None else _spread(rows.zero_points, columns, format)
    steps: Array = rows.codes.astype(np.float32) - zeros
    return steps * _spread(rows.scales.astype(np.float32), columns, format)


def count_coarse_blocks(weight: Array, rows: QuantizedRows, format: BlockFormat) -> int:
    """Blocks of weights `[N, K]`, not all of them 0, whose scale is below the normal numbers of its type.

    Such a scale is off by up to half of the smallest number of its type; in float32 and bfloat16 its block becomes 0.
    """
    normal = ml_dtypes.finfo(rows.scales.dtype).smallest_normal  # type: ignore[no-untyped-call]
    small = np.abs(rows.scales.astype(np.float32)) < float(normal)
    if not small.any():
        return 0
    starts = np.arange(0, weight.shape[1], format.block_size)
    return int(np.count_nonzero(small & np.logical_or.reduceat(weight != 0, starts, axis=1)))


def join_rows(pieces: Sequence[QuantizedRows]) -> QuantizedRows:
    """Pieces of a matrix, in order, as one."""
    zeros = [piece.zero_points for piece in pieces if piece.zero_points is not None]
    return QuantizedRows(
        np.concatenate([piece.codes for piece in pieces]),
        np.concatenate([piece.scales for piece in pieces]),
        np.concatenate(zeros) if zeros else None,
    )


def _spread(values: Array, columns: int, format: BlockFormat) -> Array:
    """One value a block to one a column."""
    return np.repeat(values, format.block_size, axis=1)[:, :columns]


def _stored(scales: Array, scale_type: np.dtype[Any]) -> Array:
    """Scales in the type in which they are stored; one that is not 0 does not become 0."""
    stored = scales.astype(scale_type)
    lost = (stored == 0) & (scales != 0)
    if lost.any():
        smallest = np.array(1, dtype=np.uint16).view(scale_type)
        stored[lost] = np.copysign(smallest, scales[lost]).astype(scale_type)
    return stored


def _search_symmetric(weights: Array, format: BlockFormat) -> tuple[Array, Array]:
    """Scales and zero points `[blocks]` of weights `[block, blocks]`."""
    at = np.abs(weights).argmax(axis=0)
    peak = weights[at, np.arange(weights.shape[1])]
    # In units of the largest weight nothing overflows, and one target serves all blocks.
    relative = weights * _reciprocal(peak)
    search = _LeastSquares(relative)
    zero = np.full(peak.shape, format.middle, dtype=np.float32)
    for target in format.type.targets:
        search.offer(np.float32(target), zero, format)
    return search.scale * peak, search.zero


def _search_asymmetric(weights: Array, format: BlockFormat) -> tuple[Array, Array]:
    """Scales and zero points `[blocks]` of weights `[block, blocks]`; zero itself always has a code."""
    peak = np.abs(weights).max(axis=0)
    relative = weights * _reciprocal(peak)
    low, high = np.minimum(relative.min(axis=0), 0), np.maximum(relative.max(axis=0), 0)
    search = _LeastSquares(relative)
    for below, above in _SHRINKS:
        step = (high * np.float32(above) - low * np.float32(below)) / np.float32(format.top)
        factor = _reciprocal(step)
        search.offer(factor, np.clip(np.rint(-low * np.float32(below) * factor), 0, format.top), format)
    return search.scale * peak, search.zero


class _LeastSquares:
    """The best of several ways to place codes on weights `[block, blocks]`, for each block."""

    def __init__(self, weights: Array) -> None:
        count = weights.shape[1]
        self.scale = np.zeros(count, dtype=np.float32)
        self.zero = np.zeros(count, dtype=np.float32)
        self._weights, self._gain = weights, np.full(count, -1, dtype=np.float32)
        self._steps, self._product = np.empty_like(weights), np.empty_like(weights)

    def offer(self, factor: np.float32 | Array, zero: Array, format: BlockFormat) -> None:
        """Take the codes rint(weights * factor) + zero, within their range, for the blocks where they are better."""
        steps, product = self._steps, self._product
        np.multiply(self._weights, factor, out=steps)
        np.rint(steps, out=steps)
        np.maximum(steps, -zero, out=steps)
        np.minimum(steps, format.top - zero, out=steps)
        along = _sum(np.multiply(self._weights, steps, out=product))
        square = np.maximum(_sum(np.multiply(steps, steps, out=product)), 1)
        gain = along * along / square
        better = gain > self._gain
        self._gain[better] = gain[better]
        self.scale[better] = (along / square)[better]
        self.zero[better] = zero[better]


def _sum(values: Array) -> Array:
    """Along the first axis, in order, so that a block's sum does not depend on how many blocks stand beside it."""
    count = values.shape[1]
    # numpy adds a single column up in another order.
    total: Array = np.add.reduce(values if count > 1 else np.repeat(values, 2, axis=1), axis=0)
    return total[:count]


def _encode(weights: Array, scales: Array, zeros: Array, format: BlockFormat) -> Array:
    steps: Array = weights * _reciprocal(scales.astype(np.float32))
    np.rint(steps, out=steps)
    steps += zeros
    return np.clip(steps, 0, format.top, out=steps).astype(np.uint8)


def _reciprocal(values: Array) -> Array:
    """1/x, and 0 where that would overflow: a block of zeros then has the code of zero everywhere."""
    usable = np.abs(values) >= _TINY
    return np.divide(np.float32(1), values, out=np.zeros_like(values), where=usable)
