"""PyTorch DCP (torch.distributed.checkpoint): a folder of `.distcp` files and the `.metadata` that describes them.

`.metadata` is a pickle: each tensor's dtype, shape and chunks (offsets and sizes), and for each chunk the region of a
file that holds it, itself a file of `torch.save`. A region is opened when it is read; chunks may be cut along any
dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retnet_tools.errors import InputError
from retnet_tools.formats.boxes import fill_exactly
from retnet_tools.formats.content import quantized_error, short_name
from retnet_tools.formats.pickles import unpickle
from retnet_tools.formats.stand_ins import Global, Shell, Storage, TensorView, is_tensor
from retnet_tools.formats.state_dicts import MAX_DEPTH, Choice, averages_apart, choose, is_beside_weights
from retnet_tools.formats.storage import BLOCK_BYTES, StoredTensors, TensorLocation, contiguous_strides
from retnet_tools.formats.torch_files import DTYPES, read_torch
from retnet_tools.weights import Array, FileRegion, TensorInfo

MAX_CHUNKS = 1 << 14
_NO_STORAGE = Storage("uint8", "", 0, 0)


class Chunk(NamedTuple):
    """A box of a tensor, and the region of the file that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


class ChunkedTensor(NamedTuple):
    """A tensor in chunks that fill it, those without elements left out."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[Chunk, ...]


class ChunkedTensors(StoredTensors):
    """The tensors of a DCP checkpoint. Memory of `read`: the tensor and one chunk; of `blocks`: about 16 MB of rows.

    Its `locations` are for their names: no tensor lies in one place.
    """

    def __init__(self, metadata_file: Path, tensors: Mapping[str, ChunkedTensor]) -> None:
        end = metadata_file.stat().st_size
        locations = {
            name: TensorLocation(metadata_file, end, tensor.shape, tensor.dtype, contiguous_strides(tensor.shape))
            for name, tensor in tensors.items()
        }
        super().__init__(locations)
        self._tensors = dict(tensors)

    def files(self) -> list[Path]:
        """The `.distcp` files that hold the tensors."""
        return list(dict.fromkeys(chunk.file for tensor in self._tensors.values() for chunk in tensor.chunks))

    def read(self, name: str) -> Array:
        """The tensor, assembled chunk by chunk."""
        tensor = self._tensors[name]
        places = [(chunk, _locate(name, tensor, chunk)) for chunk in tensor.chunks]
        return _filled(tensor.shape, tensor.dtype, 0, places) if tensor.shape else places[0][1].read()

    def blocks(self, name: str) -> Iterator[Array]:
        """The tensor in pieces of whole rows of about 16 MB."""
        tensor = self._tensors[name]
        if not tensor.shape or not tensor.chunks:
            yield self.read(name)
            return
        places = [(chunk, _locate(name, tensor, chunk)) for chunk in tensor.chunks]
        count = _rows_of_a_block(tensor.shape, tensor.dtype)
        for start in range(0, tensor.shape[0], count):
            yield _filled((min(count, tensor.shape[0] - start), *tensor.shape[1:]), tensor.dtype, start, places)

    def region(self, name: str) -> FileRegion | None:
        """None: a region's bytes are found when it is read."""
        return None

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, without reading the data."""
        return TensorInfo(self._tensors[name].shape, self._tensors[name].dtype)

    def same_data(self, first: str, second: str) -> bool:
        """Whether two tensors are equal byte for byte; memory: two blocks of 16 MB."""
        a, b = self._tensors[first], self._tensors[second]
        if a == b:
            return True
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return all(x.tobytes() == y.tobytes() for x, y in zip(self.blocks(first), self.blocks(second), strict=True))


def open_dcp(metadata_file: Path, entry: str | None = None) -> tuple[ChunkedTensors, Choice]:
    """The tensors of a DCP checkpoint's model, under their own names.

    Raises:
        InputError: a `.metadata` that cannot be read, a missing or short `.distcp`, chunks that do not fill a tensor,
            compressed or quantized tensors.
        UsageError: no such entry.
    """
    with metadata_file.open("rb") as file:
        metadata = _fields(metadata_file, unpickle(file, metadata_file))
    described = {
        name: value
        for name, value in _mapping(metadata_file, metadata.get("state_dict_metadata")).items()
        if isinstance(name, str) and isinstance(value, Shell) and value.kind.endswith("TensorStorageMetadata")
    }
    paths = metadata.get("planner_data")
    groups: dict[str, dict[str, TensorView]] = {}
    for name, value in described.items():
        path = paths.get(name) if isinstance(paths, dict) else None
        path = path if isinstance(path, tuple) and len(path) <= MAX_DEPTH + 1 else ()
        group = ".".join(str(key)[:60] for key in path[:-1] if isinstance(key, str | int)) if path else ""
        shape = value.entries().get("size")
        if not is_beside_weights(f"{group}.{name.split('.')[0]}") and isinstance(shape, tuple):
            groups.setdefault(group, {})[name] = TensorView(_NO_STORAGE, "", 0, shape, shape)
    matrices = {g: names for g, names in groups.items() if any(len(t.shape) > 1 for t in names.values())}
    apart = {part: names for g, of_g in (matrices or groups).items() for part, names in averages_apart(g, of_g).items()}
    choice = choose(apart, f"{metadata_file.parent.name}/{metadata_file.name}", entry)
    places = _places(metadata_file, metadata.get("storage_data"), choice.tensors.keys())
    tensors = {name: _tensor(metadata_file, name, described[name], places) for name in choice.tensors}
    return ChunkedTensors(metadata_file, tensors), choice


Places = dict[tuple[str, tuple[int, ...]], Chunk]


def _places(metadata_file: Path, data: Any, names: Any) -> Places:
    """The regions of all chunks, by the tensor's name and the chunk's offsets."""
    folder = metadata_file.parent
    places: Places = {}
    files: dict[str, tuple[Path, int]] = {}
    for key, value in _mapping(metadata_file, data).items():
        index = _fields(metadata_file, key)
        tensor = index.get("fqn")
        if not isinstance(tensor, str) or tensor not in names:
            continue
        info = _fields(metadata_file, value)
        name, start, length = info.get("relative_path"), info.get("offset", -1), info.get("length", -1)
        offsets = index.get("offset") or ()
        if not isinstance(name, str) or not isinstance(offsets, tuple) or not _are_counts((start, length, *offsets)):
            raise _broken(metadata_file, f"a broken place of {tensor[:60]!r}")
        if info.get("transform_descriptors"):
            raise InputError(f"{short_name(folder)} has compressed .distcp files", "plain ones", "save it plain")
        if name not in files:
            files[name] = _part(metadata_file, name)
        file, size = files[name]
        if size < start + length:
            raise InputError(
                f"{short_name(file)} in {short_name(folder)} is truncated: {size} bytes",
                f"{start + length}, as .metadata says",
                "fetch it again",
            )
        places[tensor, offsets] = Chunk(offsets, (), file, start, length)
    return places


def _part(metadata_file: Path, name: str) -> tuple[Path, int]:
    """A `.distcp` file and its size."""
    if Path(name).name != name or "\0" in name:
        raise _broken(metadata_file, f"the file name {name[:60]!r}")
    file = metadata_file.parent / name
    if not file.is_file():
        raise InputError(
            f"no {short_name(file)} in {short_name(metadata_file.parent)}",
            "every file that .metadata names",
            "fetch the missing part",
        )
    return file, file.stat().st_size


def _tensor(metadata_file: Path, name: str, described: Shell, places: Places) -> ChunkedTensor:
    fields = described.entries()
    shape, dtype = fields.get("size"), _dtype_name(fields.get("properties"))
    chunks = fields.get("chunks")
    if not isinstance(shape, tuple) or not _are_counts(shape) or not isinstance(chunks, list) or dtype is None:
        raise _broken(metadata_file, f"a broken description of {name[:60]!r}")
    if dtype not in DTYPES:
        raise quantized_error(metadata_file.parent, "fp8" if dtype.startswith("float8") else dtype[:20], name)
    found = []
    for chunk in chunks:
        box = _fields(metadata_file, chunk)
        offsets, sizes = box.get("offsets"), box.get("sizes")
        if not isinstance(offsets, tuple) or not isinstance(sizes, tuple) or not _are_counts((*offsets, *sizes)):
            raise _broken(metadata_file, f"a broken chunk of {name[:60]!r}")
        if 0 in sizes:
            continue
        place = places.get((name, offsets))
        if place is None:
            raise InputError(
                f"{short_name(metadata_file.parent)} has no data for {name[:60]!r} at {list(offsets)}",
                "every chunk in a .distcp file",
                "fetch it again",
            )
        found.append(place._replace(sizes=sizes))
    if len(found) > MAX_CHUNKS or not fill_exactly([(c.offsets, c.sizes) for c in found], shape):
        raise InputError(
            f"{short_name(metadata_file.parent)} has chunks of {name[:60]!r} that overlap or leave gaps",
            f"chunks that fill {list(shape)}",
            "save it again",
        )
    return ChunkedTensor(shape, DTYPES[dtype], tuple(found))


def _locate(name: str, tensor: ChunkedTensor, chunk: Chunk) -> TensorLocation:
    """Where a chunk's elements lie, told by the torch file in its region."""
    content = read_torch(chunk.file, chunk.start, chunk.length)
    if not is_tensor(content.tree):
        raise InputError(f"{chunk.file.name} holds no tensor for {name[:60]!r}", "a chunk of it", "fetch it again")
    location = content.locate(name, content.tree)
    if location.shape != chunk.sizes or location.dtype != tensor.dtype:
        raise InputError(
            f"{chunk.file.name} holds {location.dtype} {list(location.shape)} for a chunk of {name[:60]!r}",
            f"{tensor.dtype} {list(chunk.sizes)}, as .metadata says",
            "fetch it again",
        )
    return location


def _filled(
    shape: tuple[int, ...], dtype: np.dtype[Any], start: int, places: Sequence[tuple[Chunk, TensorLocation]]
) -> Array:
    rows = np.empty(shape, dtype)
    for chunk, place in places:
        _fill(rows, start, chunk, place)
    return rows


def _fill(rows: Array, start: int, chunk: Chunk, place: TensorLocation) -> None:
    """Copy into `rows`, which are a tensor's from `start`, those that a chunk has; memory: 16 MB where they do not
    lie together in both.
    """
    first, last = max(start, chunk.offsets[0]), min(start + len(rows), chunk.offsets[0] + chunk.sizes[0])
    columns = tuple(slice(o, o + n) for o, n in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True))
    row_bytes = place.strides[0] * place.dtype.itemsize
    together = chunk.sizes[1:] == rows.shape[1:] and place.strides == contiguous_strides(place.shape)
    count = max(1, last - first) if together else _rows_of_a_block(place.shape, place.dtype)
    for row in range(first, last, count):
        end = min(row + count, last)
        offset = place.offset + (row - chunk.offsets[0]) * row_bytes
        piece = place._replace(offset=offset, shape=(end - row, *place.shape[1:]))
        target = rows[row - start : end - start]
        if together:
            piece.read_into(target)
        else:
            target[(slice(None), *columns)] = piece.read()


def _rows_of_a_block(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return max(1, BLOCK_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))


def _dtype_name(properties: Any) -> str | None:
    """The dtype in `TensorProperties`, which older releases keep as an attribute and newer ones in a tuple."""
    if not isinstance(properties, Shell):
        return None
    state = properties.state
    dtype = state[0] if isinstance(state, tuple) and state else properties.entries().get("dtype")
    return dtype.name if isinstance(dtype, Global) and dtype.module == "torch" else None


def _fields(metadata_file: Path, value: Any) -> dict[Any, Any]:
    if not isinstance(value, Shell):
        raise _broken(metadata_file, "something that torch.distributed.checkpoint does not write")
    return value.entries()


def _mapping(metadata_file: Path, value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise _broken(metadata_file, "something that torch.distributed.checkpoint does not write")
    return value


def _are_counts(values: Sequence[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _broken(metadata_file: Path, what: str) -> InputError:
    folder = short_name(metadata_file.parent)
    return InputError(f"{folder} has {what}", "a .metadata of torch.distributed.checkpoint", "fetch it again")
