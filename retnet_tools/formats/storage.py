"""Tensors where they lie in files: found by name, read one at a time.

A header is parsed and checked against its file's size when a checkpoint is opened; data is read by one `read` of the
tensor's own bytes into a fresh array. Nothing is mapped and nothing is kept, so resident memory is bounded by the
tensors that the caller holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from retnet_tools.errors import InputError
from retnet_tools.weights import Array, FileRegion, TensorInfo

SAFETENSORS_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
MAX_HEADER = 100_000_000
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
        flat = np.fromfile(self.file, dtype=np.uint8, count=self.span * self.dtype.itemsize, offset=self.offset)
        if flat.size != self.span * self.dtype.itemsize:
            raise InputError(
                f"{self.file} ends {self.span * self.dtype.itemsize - flat.size} bytes inside a tensor",
                "the size it had when it was opened",
                "fetch or copy it again",
            )
        values = flat.view(self.dtype)
        if self.strides == contiguous_strides(self.shape):
            return values.reshape(self.shape)
        strides = tuple(stride * self.dtype.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(values, self.shape, strides).copy()

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
    """

    def __init__(self, tensors: Mapping[str, TensorLocation], metadata: Mapping[str, str] | None = None) -> None:
        self.locations = dict(tensors)
        self.metadata = dict(metadata or {})

    def names(self) -> Iterable[str]:
        """Names of all tensors, in storage order."""
        return self.locations.keys()

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
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as JSON ({error})", "a JSON document", "fetch or write it again"
        ) from error


def open_safetensors(path: Path) -> StoredTensors:
    """The tensors of one safetensors file, its header checked against its size.

    Raises:
        InputError: truncated, with trailing bytes, overlapping tensors, an unknown dtype or a broken header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise InputError(
                f"{path} has {size} bytes and names a header of {length}",
                "a complete safetensors file",
                "fetch it again",
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"a header that cannot be read ({error})") from error
    if not isinstance(header, dict):
        raise _broken(path, "a header that is no object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "metadata that is no object of strings")
    data_start = 8 + length
    tensors = {name: _location(path, data_start, name, entry) for name, entry in header.items()}
    _check_layout(path, size, data_start, tensors)
    return StoredTensors(tensors, metadata)


def open_shards(index: Path, open_shard: Callable[[Path], StoredTensors]) -> StoredTensors:
    """The tensors of the shards that an index (`*.index.json`, `weight_map` from tensor to file) names.

    Raises:
        InputError: a broken index, a shard name that leads out of the folder, a shard that is missing, and a tensor
            that its shard does not hold or that the index does not name.
    """
    document = load_json(index)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{index} has no weight_map", "an object from tensor name to shard file", "fetch it again")
    shards: dict[str, StoredTensors] = {}
    for shard in dict.fromkeys(weight_map.values()):
        if Path(shard).name != shard or "\\" in shard or "\0" in shard or shard in ("", ".", ".."):
            raise InputError(f"{index} names the shard {shard!r}", "a file name inside the folder", "correct the index")
        path = index.parent / shard
        if not path.is_file():
            raise InputError(f"no shard {shard!r}, which {index.name} names", str(path), "fetch the missing shard")
        shards[shard] = open_shard(path)
        for name in shards[shard].names():
            if weight_map.get(name) != shard:
                raise InputError(
                    f"{path} holds {name!r}", f"only what {index.name} places there", "fetch the index again"
                )
    tensors = {}
    for name, shard in weight_map.items():
        if name not in shards[shard].locations:
            raise InputError(
                f"{index.parent / shard} has no tensor {name!r}", f"it, as {index.name} says", "fetch it again"
            )
        tensors[name] = shards[shard].locations[name]
    return StoredTensors(tensors)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name {name!r} occurs twice")
        result[name] = value
    return result


def _location(path: Path, data_start: int, name: str, entry: Any) -> TensorLocation:
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(path, f"a broken header entry for {name!r}") from error
    dtype = SAFETENSORS_DTYPES.get(str(dtype_name))
    if dtype is None:
        raise InputError(
            f"tensor {name!r} in {path} is {dtype_name}", "F16, BF16, F32 or F64", "convert it to one of them"
        )
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise _broken(path, f"{end - begin} bytes for {name!r} of shape {list(shape)} in {dtype_name}")
    return TensorLocation(path, data_start + begin, tuple(shape), dtype, contiguous_strides(tuple(shape)))


def _check_layout(path: Path, size: int, data_start: int, tensors: Mapping[str, TensorLocation]) -> None:
    end = data_start
    for location in sorted(tensors.values(), key=lambda t: (t.offset, t.span)):
        if location.offset != end:
            raise _broken(path, f"tensor data that starts at byte {location.offset} where the one before ends at {end}")
        end += location.span * location.dtype.itemsize
    if end != size:
        raise InputError(f"{path} has {size} bytes", f"{end}, as its header says", "fetch it again")


def _broken(path: Path, what: str) -> InputError:
    return InputError(f"{path} has {what}", "a valid safetensors file", "fetch it again")
