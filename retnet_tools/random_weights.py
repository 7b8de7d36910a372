"""Random weights of any shapes, for measuring speed and memory at sizes of which there is no checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache

import numpy as np

from retnet_tools.weights import Array, TensorInfo, WeightSource

PERIOD = 4_194_301
"""Numbers that are drawn (16 MB). A prime, so that rows of a matrix do not repeat."""
_BLOCK_BYTES = 16 << 20


def noise(shape: tuple[int, ...], start: int = 0) -> Array:
    """N(0, 1) numbers in float32, as fast as memory is written: from one run that repeats, from `start` on."""
    run, place = _run(), start % PERIOD
    result = np.empty(math.prod(shape), dtype=np.float32)
    filled = 0
    while filled < len(result):
        piece = run[place : place + len(result) - filled]
        result[filled : filled + len(piece)] = piece
        filled, place = filled + len(piece), 0
    return result.reshape(shape)


@cache
def _run() -> Array:
    return np.random.default_rng(0).standard_normal(PERIOD, dtype=np.float32)


class RandomWeights(WeightSource):
    """A `WeightSource` of float32 tensors that are made when they are read, from one run of random numbers.

    Matrices `[out, in]` are N(0, 1/in), norm weights N(1, 0.01), biases N(0, 0.01). Every tensor starts elsewhere in
    the run, because ONNX Runtime keeps one packed copy of weights that are equal: a model of equal layers would run
    from the cache.

    Args:
        shapes: of the tensors, by name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)
        self._starts = {name: i * PERIOD // max(1, len(self._shapes)) for i, name in enumerate(self._shapes)}

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._shapes

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype."""
        return TensorInfo(self._shapes[name], np.dtype(np.float32))

    def read(self, name: str) -> Array:
        """The tensor."""
        return self._rows(name, 0, self._shapes[name][0])

    def blocks(self, name: str) -> Iterator[Array]:
        """The tensor in pieces of about 16 MB along its first axis."""
        shape = self._shapes[name]
        count = max(1, _BLOCK_BYTES // (4 * math.prod(shape[1:])))
        for first in range(0, shape[0], count):
            yield self._rows(name, first, min(count, shape[0] - first))

    def _rows(self, name: str, first: int, count: int) -> Array:
        width = math.prod(self._shapes[name][1:])
        start = (self._starts[name] + first * width) % PERIOD
        values = noise((count, *self._shapes[name][1:]), start)
        if values.ndim > 1:
            return values / np.float32(math.sqrt(width))
        return np.float32(0 if name.endswith(".bias") else 1) + np.float32(0.1) * values
