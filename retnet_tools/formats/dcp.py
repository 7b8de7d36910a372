"""PyTorch DCP (torch.distributed.checkpoint): a folder of `.distcp` files and the `.metadata` that describes them.

`.metadata` is a pickle: each tensor's dtype, shape and chunks (offsets and sizes), and for each chunk the region of a
file that holds it, itself a file of `torch.save`. A region is opened when it is read; chunks may be cut along any
dimensions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retnet_tools.errors import InputError
from retnet_tools.formats.content import quantized_error, short_name
from retnet_tools.formats.pickles import unpickle
from retnet_tools.formats.stand_ins import Global, Shell, Storage, TensorView, is_tensor
from retnet_tools.formats.state_dicts import MAX_DEPTH, Choice, averages_apart, choose, is_beside_weights
from retnet_tools.formats.storage import DTYPES, LazyTensor, StoredTensors, TensorLocation
from retnet_tools.formats.torch_files import EXPANDED_BYTES, is_count, read_torch
from retnet_tools.inputs import open_input, part_path
from retnet_tools.weights import Array

MAX_CHUNKS = 1 << 14
MAX_CUT_AXES = 6
Box = tuple[tuple[int, ...], tuple[int, ...]]
_NO_STORAGE = Storage("uint8", "", 0, 0)


class Chunk(NamedTuple):
    """A box of a tensor, and the region of the file that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class ChunkedTensor(LazyTensor):
    """A tensor in chunks that fill it, those without elements left out.

    Memory of `read`: the tensor and one chunk; of `blocks`: about 16 MB of rows.
    """

    chunks: tuple[Chunk, ...]
    name: str = field(compare=False)

    def files(self) -> Sequence[Path]:
        """The `.distcp` files that hold it."""
        return [chunk.file for chunk in self.chunks]

    def read(self) -> Array:
        """The tensor, assembled chunk by chunk."""
        return self._rows(0, self.shape[0]) if self.shape else self._places[0][1].read()

    def blocks(self) -> Iterator[Array]:
        """The tensor in pieces of whole rows of about 16 MB."""
        return (self._rows(*rows) for rows in self.row_ranges()) if self.shape else iter((self.read(),))

    @cached_property
    def _places(self) -> list[tuple[Chunk, TensorLocation]]:
        return [(chunk, self._locate(chunk)) for chunk in self.chunks]

    def _locate(self, chunk: Chunk) -> TensorLocation:
        """Where a chunk's elements lie, told by the torch file in its region."""
        content = read_torch(chunk.file, chunk.start, chunk.length)
        if not is_tensor(content.tree):
            found = f"{chunk.file.name} holds no tensor for {self.name[:60]!r}"
            raise InputError(found, "a chunk of it", "fetch it again")
        location = content.locate(self.name, content.tree)
        if (location.shape, location.dtype) != (chunk.sizes, self.dtype):
            found = f"{location.dtype} {list(location.shape)} for a chunk of {self.name[:60]!r}"
            expected = f"{self.dtype} {list(chunk.sizes)}, as .metadata says"
            raise InputError(f"{chunk.file.name} holds {found}", expected, "fetch it again")
        return location

    def _rows(self, start: int, count: int) -> Array:
        rows = np.empty((count, *self.shape[1:]), self.dtype)
        for chunk, place in self._places:
            _fill(rows, start, chunk, place)
        return rows


def _fill(rows: Array, start: int, chunk: Chunk, place: TensorLocation) -> None:
    """Copy into `rows`, which are a tensor's from `start`, those that a chunk has; memory: 16 MB where they do not
    lie together in both.
    """
    before = chunk.offsets[0]
    first, last = max(start, before), min(start + len(rows), before + chunk.sizes[0])
    if first >= last:
        return
    target, part = rows[first - start : last - start], place.rows(first - before, last - first)
    if target.shape == part.shape and part.is_contiguous():
        part.read_into(target)
        return
    columns = (slice(o, o + n) for o, n in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True))
    target = target[(slice(None), *columns)]
    for row, count in part.row_ranges():
        target[row : row + count] = part.rows(row, count).read()


def open_dcp(metadata_file: Path, entry: str | None = None) -> tuple[StoredTensors, Choice]:
    """The tensors of a DCP checkpoint's model, under their own names.

    Raises:
        InputError: a `.metadata` that cannot be read, a missing or short `.distcp`, chunks that do not fill a tensor,
            compressed or quantized tensors.
        UsageError: no such entry.
    """
    with open_input(metadata_file) as file:
        metadata = _entries(metadata_file, unpickle(file, metadata_file))
    described = {
        name: value
        for name, value in _entries(metadata_file, metadata.get("state_dict_metadata")).items()
        if isinstance(name, str) and isinstance(value, Shell) and value.kind.endswith("TensorStorageMetadata")
    }
    paths = metadata.get("planner_data")
    groups: dict[str, dict[str, TensorView]] = {}
    for name, value in described.items():
        path = paths.get(name) if isinstance(paths, dict) else None
        keys = path[:-1] if isinstance(path, tuple) and len(path) <= MAX_DEPTH + 1 else ()
        group = ".".join(str(key)[:60] for key in keys if isinstance(key, str | int))
        shape = value.entries().get("size")
        if not is_beside_weights(f"{group}.{name.split('.')[0]}") and isinstance(shape, tuple):
            groups.setdefault(group, {})[name] = TensorView(_NO_STORAGE, "", 0, shape, shape)
    matrices = {g: names for g, names in groups.items() if any(len(t.shape) > 1 for t in names.values())}
    apart = {part: names for g, of_g in (matrices or groups).items() for part, names in averages_apart(g, of_g).items()}
    choice = choose(apart, f"{metadata_file.parent.name}/{metadata_file.name}", entry)
    places = _places(metadata_file, metadata.get("storage_data"), choice.tensors)
    tensors = {name: _tensor(metadata_file, name, described[name], places) for name in choice.tensors}
    return StoredTensors(tensors), choice


Places = dict[tuple[str, tuple[int, ...]], Chunk]


def _places(metadata_file: Path, data: Any, names: Mapping[str, Any]) -> Places:
    """The regions of all chunks, by the tensor's name and the chunk's offsets."""
    folder, places = metadata_file.parent, Places()
    files: dict[str, tuple[Path, int]] = {}
    for key, value in _entries(metadata_file, data).items():
        index = _entries(metadata_file, key)
        tensor = index.get("fqn")
        if not isinstance(tensor, str) or tensor not in names:
            continue
        info = _entries(metadata_file, value)
        name, what = info.get("relative_path"), f"place of {tensor[:60]!r}"
        if not isinstance(name, str):
            raise _broken(metadata_file, f"a broken {what}")
        start, length = _counts(metadata_file, (info.get("offset"), info.get("length")), what)
        offsets = _counts(metadata_file, index.get("offset") or (), what)
        if info.get("transform_descriptors"):
            raise InputError(f"{short_name(folder)} has compressed .distcp files", "plain ones", "save it plain")
        if name not in files:
            files[name] = _part(metadata_file, name)
        file, size = files[name]
        if size < start + length:
            found = f"{short_name(file)} in {short_name(folder)} is truncated: {size} bytes"
            raise InputError(found, f"{start + length}, as .metadata says", "fetch it again")
        places[tensor, offsets] = Chunk(offsets, (), file, start, length)
    return places


def _part(metadata_file: Path, name: str) -> tuple[Path, int]:
    """A `.distcp` file and its size."""
    if (file := part_path(metadata_file.parent, name)) is None:
        raise _broken(metadata_file, f"the file name {name[:60]!r}")
    if not file.is_file():
        found = f"no {short_name(file)} in {short_name(metadata_file.parent)}"
        raise InputError(found, "every file that .metadata names", "fetch the missing part")
    return file, file.stat().st_size


def _tensor(metadata_file: Path, name: str, described: Shell, places: Places) -> ChunkedTensor:
    fields, folder = described.entries(), metadata_file.parent
    dtype, chunks = _dtype_name(fields.get("properties")), fields.get("chunks")
    shape = _counts(metadata_file, fields.get("size"), what := f"description of {name[:60]!r}")
    if not isinstance(chunks, list) or dtype is None:
        raise _broken(metadata_file, f"a broken {what}")
    if dtype not in DTYPES:
        raise quantized_error(folder, "fp8" if dtype.startswith("float8") else dtype[:20], name)
    found = []
    for chunk in chunks:
        box = _entries(metadata_file, chunk)
        offsets, sizes = (_counts(metadata_file, box.get(k), f"chunk of {name[:60]!r}") for k in ("offsets", "sizes"))
        if 0 in sizes:
            continue
        place = places.get((name, offsets))
        if place is None:
            missing = f"{short_name(folder)} has no data for {name[:60]!r} at {list(offsets)}"
            raise InputError(missing, "every chunk in a .distcp file", "fetch it again")
        if math.prod(sizes) * DTYPES[dtype].itemsize > max(place.length, EXPANDED_BYTES):
            wrong = f"{short_name(folder)} has {place.length} bytes for {list(sizes)} of {name[:60]!r}"
            raise InputError(wrong, f"{dtype}, an element of its own for each", "fetch it again")
        found.append(place._replace(sizes=sizes))
    if len(found) > MAX_CHUNKS or not fill_exactly([(c.offsets, c.sizes) for c in found], shape):
        wrong = f"{short_name(folder)} has chunks of {name[:60]!r} that overlap or leave gaps"
        raise InputError(wrong, f"chunks that fill {list(shape)}", "save it again")
    return ChunkedTensor(shape, DTYPES[dtype], tuple(found), name)


def fill_exactly(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """Whether boxes, none of them empty, fill a shape, each element once.

    They do if their volumes add up to the shape's, and the points that are corners of an odd number of them are the
    shape's corners: then every element lies in an odd number of boxes, and none outside does.
    """
    if any(len(offsets) != len(shape) or len(sizes) != len(shape) for offsets, sizes in boxes):
        return False
    if sum(math.prod(sizes) for _, sizes in boxes) != math.prod(shape):
        return False
    cut = [i for i, size in enumerate(shape) if any((o[i], n[i]) != (0, size) for o, n in boxes)]
    if 0 in shape or len(cut) > MAX_CUT_AXES:
        return not boxes
    odd: set[tuple[int, ...]] = set()
    for offsets, sizes in boxes:
        odd ^= set(itertools.product(*((offsets[i], offsets[i] + sizes[i]) for i in cut)))
    return odd == set(itertools.product(*((0, shape[i]) for i in cut)))


def _dtype_name(properties: Any) -> str | None:
    """The dtype in `TensorProperties`, which older releases keep as an attribute and newer ones in a tuple."""
    if not isinstance(properties, Shell):
        return None
    state = properties.state
    dtype = state[0] if isinstance(state, tuple) and state else properties.entries().get("dtype")
    return dtype.name if isinstance(dtype, Global) and dtype.module == "torch" else None


def _entries(metadata_file: Path, value: Any) -> dict[Any, Any]:
    found = value.entries() if isinstance(value, Shell) else value
    if not isinstance(found, dict):
        raise _broken(metadata_file, "something that torch.distributed.checkpoint does not write")
    return found


def _counts(metadata_file: Path, value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(map(is_count, value)):
        raise _broken(metadata_file, f"a broken {what}")
    return value


def _broken(metadata_file: Path, what: str) -> InputError:
    folder = short_name(metadata_file.parent)
    return InputError(f"{folder} has {what}", "a .metadata of torch.distributed.checkpoint", "fetch it again")
