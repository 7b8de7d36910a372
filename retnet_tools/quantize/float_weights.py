"""The float weights that codes are chosen for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from retnet_tools.dtypes import convert
from retnet_tools.weights import Array, FiniteWeights, TensorInfo, WeightSource


class FloatWeights:
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
        return convert(name, self._source.read(name), self._dtype).astype(np.float32)
