"""What work on calibration tokens reads: the float weights, and hidden states, which lie on disk, some sequences in
memory at a time, and are refused where they are not finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from retnet_tools.dtypes import convert_array
from retnet_tools.errors import InputError
from retnet_tools.weights import Array, FiniteWeights, TensorInfo, WeightSource

BATCH_TOKENS = 2048
"""Tokens whose activations are in memory at a time; at least one sequence."""


class FloatWeights(FiniteWeights):
    """Weights as an export of type `dtype` holds them: finite, rounded to it, and in float32.

    Raises:
        InputError: when it is read, a tensor with NaN, infinities, or a value that the type cannot hold.
    """

    def __init__(self, source: WeightSource, dtype: np.dtype[Any]) -> None:
        super().__init__(source)
        self._dtype = dtype

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, without reading the data."""
        return TensorInfo(super().info(name).shape, np.dtype(np.float32))

    def read(self, name: str) -> Array:
        """The tensor's data, float32."""
        return self._rounded(name, super().read(name))

    def blocks(self, name: str) -> Iterator[Array]:
        """The tensor in pieces along its first axis, float32."""
        for block in super().blocks(name):
            yield self._rounded(name, block)

    def _rounded(self, name: str, values: Array) -> Array:
        return convert_array(name, values, self._dtype).astype(np.float32)


def not_finite(name: str, what: str) -> InputError:
    """The error for a part of the model that is given or gives `what` that overflows."""
    return InputError(
        f"the calibration text gives {name} {what} that are not finite in float32",
        "a model that float32 can compute with",
        "use --method rtn without a target",
    )


def batches(sequences: Array) -> list[slice]:
    """Some sequences of `[S, T]` at a time."""
    size = max(1, BATCH_TOKENS // sequences.shape[1])
    return [slice(start, start + size) for start in range(0, len(sequences), size)]


def write_states(path: Path, count: int, parts: Iterable[Array]) -> None:
    """Store hidden states `[S, T, D]` float32 of S sequences, which come in parts `[s, T, D]`, in numpy's format."""
    parts = iter(parts)
    first = next(parts)
    shape = (count, *first.shape[1:])
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for part in chain((first,), parts):
            file.write(np.ascontiguousarray(part, dtype="<f4").data)


def read_states(path: Path, parts: Iterable[slice]) -> Iterator[Array]:
    """Parts of the sequences of a file, `[s, T, D]` float32 each."""
    states = np.load(path, mmap_mode="r")
    for part in parts:
        yield np.array(states[part])
