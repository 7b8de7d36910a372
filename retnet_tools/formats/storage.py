"""Tensors where they lie in files: found by name, read one at a time.

Data is read by one `read` of the tensor's own bytes into a fresh array. Nothing is mapped and nothing is kept, so
resident memory is bounded by the tensors that the caller holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retnet_tools.errors import InputError
from retnet_tools.weights import Array, FileRegion, TensorInfo

BLOCK_BYTES = 1 << 24


class TensorLocation(NamedTuple):
    """Where a tensor's bytes lie: its first element at `offset` of `file`, strides in elements.

    A tuple, since pickles handle these and a tuple alone has nothing that a pickle could alter.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to the last, those in between included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))

    def read(self) -> Array:
        """The tensor, contiguous and owned by the caller; memory: its span, once more if it is not contiguous.

        Raises:
            InputError: the file ends before the tensor does.
        """
        values = np.empty(self.span, self.dtype)
        self._replace(shape=values.shape, strides=(1,)).read_into(values)
        if self.strides == contiguous_strides(self.shape):
            return values.reshape(self.shape)
        strides = tuple(stride * self.dtype.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(values, self.shape, strides).copy()

    def read_into(self, target: Array) -> None:
        """Read a contiguous tensor into a contiguous array of its size and dtype.

        Raises:
            InputError: the file ends before the tensor does.
        """
        data = target.reshape(-1).view(np.uint8).data
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            done = 0
            while done < len(data) and (count := file.readinto(data[done:])):
                done += count
        if done < len(data):
            raise InputError(
                f"{self.file} ends {len(data) - done} bytes inside a tensor",
                "the size it had when it was opened",
                "fetch or copy it again",
            )

    def blocks(self) -> Iterator[Array]:
        """The tensor in pieces of whole rows of about 16 MB."""
        if not self.shape:
            yield self.read()
            return
        row_bytes = max(1, math.prod(self.shape[1:]) * self.dtype.itemsize)
        count = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, self.shape[0], count):
            rows = min(count, self.shape[0] - start)
            offset = self.offset + start * self.strides[0] * self.dtype.itemsize
            yield self._replace(offset=offset, shape=(rows, *self.shape[1:])).read()


class StoredTensors:
    """A `WeightSource` over tensors that lie in files. Memory of `read`: the tensor that it returns.

    Attributes:
        locations: where each tensor lies.
        metadata: what a safetensors file says beside its tensors.
        aliases: from each name that is only another one's in its file to that name.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorLocation],
        metadata: Mapping[str, str] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self.locations = dict(tensors)
        self.metadata = dict(metadata or {})
        self.aliases = dict(aliases or {})

    def names(self) -> Iterable[str]:
        """Names of all tensors, in storage order."""
        return self.locations.keys()

    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return list(dict.fromkeys(location.file for location in self.locations.values()))

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, without reading the data."""
        location = self.locations[name]
        return TensorInfo(location.shape, location.dtype)

    def read(self, name: str) -> Array:
        """The tensor's data, contiguous and owned by the caller."""
        return self.locations[name].read()

    def blocks(self, name: str) -> Iterator[Array]:
        """The tensor in pieces of whole rows of about 16 MB."""
        return self.locations[name].blocks()

    def region(self, name: str) -> FileRegion | None:
        """Where a contiguous tensor's bytes lie."""
        location = self.locations[name]
        if location.strides != contiguous_strides(location.shape):
            return None
        return FileRegion(location.file, location.offset, location.span * location.dtype.itemsize)

    def same_data(self, first: str, second: str) -> bool:
        """Whether two tensors share their storage or are equal byte for byte; memory: two blocks of 16 MB."""
        a, b = self.locations[first], self.locations[second]
        if a == b:
            return True
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return all(x.tobytes() == y.tobytes() for x, y in zip(a.blocks(), b.blocks(), strict=True))


class ArrayWeights:
    """A `WeightSource` over arrays in memory."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = dict(arrays)

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._arrays.keys()

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype."""
        array = self._arrays[name]
        return TensorInfo(array.shape, array.dtype)

    def read(self, name: str) -> Array:
        """The array itself."""
        return self._arrays[name]


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def load_json(path: Path) -> Any:
    """The JSON document in a file.

    Raises:
        InputError: not UTF-8, not JSON, or an object with a name twice, of which a reader would silently take one.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as JSON ({error})", "a JSON document", "fetch or write it again"
        ) from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a name that occurs twice is a `ValueError`."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name {name!r} occurs twice")
        result[name] = value
    return result
