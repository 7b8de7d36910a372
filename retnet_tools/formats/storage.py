"""Tensors that are read when asked for, and the set of them that a checkpoint stores.

Data is read by one `read` of the tensor's own bytes into a fresh array. Nothing is mapped and nothing is kept, so
resident memory is bounded by the tensors that the caller holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from retnet_tools.errors import InputError
from retnet_tools.inputs import open_input
from retnet_tools.weights import Array, FileRegion, TensorInfo, WeightSource

BLOCK_BYTES = 1 << 24
_ALL_DTYPES = ("<f8", "<f4", "<f2", ml_dtypes.bfloat16, "<i8", "<i4", "<i2", "i1", "<u8", "<u4", "<u2", "u1", "?")
# By their names in numpy and in torch.
DTYPES: dict[str, np.dtype[Any]] = {np.dtype(code).name: np.dtype(code) for code in _ALL_DTYPES}


@dataclass(frozen=True)
class LazyTensor(TensorInfo):
    """A tensor that is read when asked for."""

    def blocks(self) -> Iterator[Array]:
        """The tensor in pieces of whole rows of about 16 MB, each contiguous and owned by the caller."""
        raise NotImplementedError

    def read(self) -> Array:
        """The tensor, contiguous and owned by the caller."""
        return np.concatenate([block.reshape(-1) for block in self.blocks()]).reshape(self.shape)

    def files(self) -> Sequence[Path]:
        """The files that hold it."""
        return ()

    def region(self) -> FileRegion | None:
        """Where its bytes lie together and in order; None where they do not."""
        return None

    def same_data(self, other: LazyTensor) -> bool:
        """Whether both lie in one place or are equal byte for byte; memory: two blocks of 16 MB."""
        if self == other:
            return True
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        return all(x.tobytes() == y.tobytes() for x, y in zip(self.blocks(), other.blocks(), strict=True))

    def row_ranges(self) -> Iterator[tuple[int, int]]:
        """Start and number of the rows of each block."""
        count = max(1, BLOCK_BYTES // max(1, math.prod(self.shape[1:]) * self.dtype.itemsize))
        for start in range(0, max(1, self.shape[0]), count):
            yield start, min(count, self.shape[0] - start)


@dataclass(frozen=True)
class TensorLocation(LazyTensor):
    """A tensor whose first element lies at `offset` of `file`; strides in elements."""

    file: Path
    offset: int
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to the last, those in between included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))

    def files(self) -> Sequence[Path]:
        """The one file."""
        return (self.file,)

    def read(self) -> Array:
        """The tensor, contiguous and owned by the caller; memory: its span, once more if it is not contiguous."""
        values = np.empty(self.span, self.dtype)
        self.read_into(values)
        if self.is_contiguous():
            return values.reshape(self.shape)
        strides = tuple(stride * self.dtype.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(values, self.shape, strides).copy()

    def read_into(self, target: Array) -> None:
        """Read a contiguous tensor into a contiguous array of its size and dtype.

        Raises:
            InputError: the file ends before the tensor does.
        """
        data = target.reshape(-1).view(np.uint8).data
        with open_input(self.file) as file:
            file.seek(self.offset)
            done = 0
            while done < len(data) and (count := file.readinto(data[done:])):
                done += count
        if done < len(data):
            raise ends_early(self.file, len(data) - done)

    def rows(self, start: int, count: int) -> TensorLocation:
        """Some of its rows."""
        offset = self.offset + start * self.strides[0] * self.dtype.itemsize
        return replace(self, offset=offset, shape=(count, *self.shape[1:]))

    def blocks(self) -> Iterator[Array]:
        """The tensor in pieces of whole rows of about 16 MB."""
        parts = [self] if not self.shape else (self.rows(*rows) for rows in self.row_ranges())
        return (part.read() for part in parts)

    def is_contiguous(self) -> bool:
        """Whether its elements lie together, row by row."""
        return self.strides == contiguous_strides(self.shape)

    def region(self) -> FileRegion | None:
        """Where its bytes lie, if it is contiguous."""
        return FileRegion(self.file, self.offset, self.nbytes) if self.is_contiguous() else None


@dataclass(frozen=True)
class PlannedTensor(LazyTensor):
    """A tensor to write, under the name that the file gives it.

    Attributes:
        make: gives the data in pieces along the first axis, contiguous and of its dtype.
        copied: where exactly these bytes lie already, to be copied without passing through memory.
        same_as: the name of an earlier tensor whose storage this one shares (torch files only).
    """

    name: str
    make: Callable[[], Iterator[Array]]
    copied: FileRegion | None = None
    same_as: str | None = None

    def blocks(self) -> Iterator[Array]:
        """The data that would be written."""
        return self.make()

    def same_data(self, other: LazyTensor) -> bool:
        """Whether both will share their storage."""
        return isinstance(other, PlannedTensor) and (self.same_as or self.name) == (other.same_as or other.name)

    def write(self, out: IO[bytes]) -> None:
        """Write the data to a file, block by block."""
        written = 0
        for block in self.blocks():
            if block.dtype != self.dtype:
                raise InputError(f"tensor {self.name!r} gave {block.dtype}", str(self.dtype))
            out.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
            written += block.nbytes
        if written != self.nbytes:
            raise InputError(f"tensor {self.name!r} gave {written} bytes", f"{self.nbytes}")


class StoredTensors(WeightSource):
    """A `WeightSource` over tensors that lie in files. Memory of `read`: the tensor that it returns.

    Attributes:
        locations: where each tensor lies.
        metadata: what a safetensors file says beside its tensors.
        aliases: from each name that is only another one's in its file to that name.
    """

    def __init__(
        self,
        tensors: Mapping[str, LazyTensor],
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
        return list(dict.fromkeys(file for tensor in self.locations.values() for file in tensor.files()))

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, without reading the data."""
        tensor = self.locations[name]
        return TensorInfo(tensor.shape, tensor.dtype)

    def read(self, name: str) -> Array:
        """The tensor's data, contiguous and owned by the caller."""
        return self.locations[name].read()

    def blocks(self, name: str) -> Iterator[Array]:
        """The tensor in pieces of whole rows of about 16 MB."""
        return self.locations[name].blocks()

    def region(self, name: str) -> FileRegion | None:
        """Where a contiguous tensor's bytes lie."""
        return self.locations[name].region()

    def same_data(self, first: str, second: str) -> bool:
        """Whether two tensors share their storage or are equal byte for byte; memory: two blocks of 16 MB."""
        return self.locations[first].same_data(self.locations[second])


def planned(name: str, array: Array) -> PlannedTensor:
    """An array in memory, to write under a name."""
    contiguous = np.ascontiguousarray(array)
    return PlannedTensor(array.shape, array.dtype, name, lambda: iter((contiguous,)))


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def ends_early(file: Path, missing: int) -> InputError:
    """The error for a file that became shorter since it was opened."""
    expected, action = "the size it had when it was opened", "fetch or copy it again"
    return InputError(f"{file} ends {missing} bytes inside a tensor", expected, action)
