"""The float weights that codes are chosen for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from retnet_tools.dtypes import convert
from retnet_tools.weights import Array, FiniteWeights, TensorInfo, WeightSource


class FloatWeights(WeightSource):
    """A `WeightSource` of weights as an export holds them: rounded to its type, finite, and in float32.

    Args:
        source: canonical weights of any float type.
        dtype: the float type of the export.
    """

    def __init__(self, source: WeightSource, dtype: np.dtype[Any]) -> None:
        self._source, self._dtype = FiniteWeights(source), dtype

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._source.names()

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, without reading the data."""
        return TensorInfo(self._source.info(name).shape, np.dtype(np.float32))

    def read(self, name: str) -> Array:
        """The tensor's data, float32.

        Raises:
            InputError: NaN, infinities, or a value that the export's type cannot hold.
        """
        return self._rounded(name, self._source.read(name))

    def blocks(self, name: str) -> Iterator[Array]:
        """The tensor in pieces along its first axis, float32.

        Raises:
            InputError: as `read`, when the piece is reached.
        """
        for block in self._source.blocks(name):
            yield self._rounded(name, block)

    def _rounded(self, name: str, values: Array) -> Array:
        return convert(name, values, self._dtype).astype(np.float32)
