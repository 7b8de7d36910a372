"""The containers of `torch.save`: a zip of a pickle and storages, and the older run of pickles before its storages.

Both give the tree with tensors described and not placed; `TorchFile.locate` places one. No tensor data is read. Only
the zip is written, and torch is not imported for it.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from retnet_tools.errors import InputError
from retnet_tools.formats.content import quantized_error, short_name
from retnet_tools.formats.pickles import corrupt, unpickle
from retnet_tools.formats.stand_ins import Global, Storage, StrangeTensor, TensorView
from retnet_tools.formats.storage import DTYPES, PlannedTensor, TensorLocation, contiguous_strides
from retnet_tools.inputs import open_input
from retnet_tools.progress import ByteProgress

# What torch's classes of storages hold.
STORAGE_DTYPES = {
    f"{kind}Storage": dtype
    for kind, dtype in (
        *(("Double", "float64"), ("Float", "float32"), ("Half", "float16"), ("BFloat16", "bfloat16")),
        *(("Long", "int64"), ("Int", "int32"), ("Short", "int16"), ("Char", "int8"), ("Byte", "uint8")),
        *(("Bool", "bool"), ("Untyped", "uint8"), ("ComplexFloat", "complex64"), ("ComplexDouble", "complex128")),
        *(("QInt8", "qint8"), ("QUInt8", "quint8"), ("QInt32", "qint32")),
        *(("QUInt4x2", "quint4x2"), ("QUInt2x4", "quint2x4")),
    )
}
ITEM_SIZES = {"complex64": 8, "complex128": 16, "qint32": 4}
# How large an expanded tensor, whose elements share memory, may be without a storage of its size.
EXPANDED_BYTES = 1 << 20
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
# Bytes of a zip's directory, of which each entry takes some fifteen times as many in memory, and of its pickle.
MAX_DIRECTORY, MAX_PICKLE = 1 << 23, 1 << 28
# Of the entries that a pickle adds to a dict at a time.
BATCH = 1000
_TUPLES = {1: b"\x85", 2: b"\x86", 3: b"\x87"}
_BROKEN_ZIP = (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, OSError, struct.error)


class TorchFile:
    """What `torch.save` wrote: the tree, and where the storages of its tensors lie.

    Attributes:
        tree: plain values and the stand-ins of `stand_ins`.
    """

    def __init__(self, path: Path, tree: Any, find: Callable[[Storage], int]) -> None:
        self._path, self.tree, self._find = path, tree, find

    def locate(self, name: str, tensor: TensorView | StrangeTensor) -> TensorLocation:
        """Where a tensor of the tree lies, checked against its storage.

        Raises:
            InputError: a quantized, sparse or complex tensor, one without data, one that its storage cannot hold.
        """
        if isinstance(tensor, StrangeTensor) or tensor.dtype not in DTYPES:
            raise _strange_error(self._path, name, tensor)
        dtype, storage = DTYPES[tensor.dtype], tensor.storage
        counts = (tensor.offset, *tensor.shape, *tensor.strides)
        if len(tensor.shape) != len(tensor.strides) or not all(map(is_count, counts)):
            raise corrupt(self._path, "a tensor with a broken description")
        item_size = _item_size(storage.dtype)
        held = storage.numel * item_size // dtype.itemsize
        if math.prod(tensor.shape) > max(held, EXPANDED_BYTES // dtype.itemsize):
            found = f"a tensor of shape {list(tensor.shape)} in a storage of {held} elements"
            expected = "an element of its own for each"
            raise InputError(f"{short_name(self._path)} has {found}", expected, "save contiguous tensors")
        start = self._find(storage) + storage.start * item_size + tensor.offset * dtype.itemsize
        location = TensorLocation(tuple(tensor.shape), dtype, self._path, start, tuple(tensor.strides))
        if tensor.offset + location.span > held:
            raise corrupt(self._path, f"a tensor of {location.span} elements at {tensor.offset} in a storage of {held}")
        return location


def read_torch(path: Path, start: int = 0, length: int | None = None) -> TorchFile:
    """Read what `torch.save` wrote to a file, or to a region of it.

    Memory: names, shapes and whatever else is pickled; no tensor data.

    Raises:
        InputError: a pickle that names what could only be meant to run, a corrupt or truncated file, compressed
            entries, big-endian data, a TorchScript archive.
    """
    length = path.stat().st_size if length is None else length
    with io.BufferedReader(_Region(path, start, length)) as file:
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        return TorchFile(path, *(_read_zip if is_zip else _read_legacy)(path, file, start, length))


class _Region(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        self._file, self._start, self._end = open_input(path), start, start + length
        self._file.seek(start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (self._start, self._file.tell(), self._end)[whence]
        return self._file.seek(base + offset) - self._start

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(memoryview(buffer)[: max(0, self._end - self._file.tell())]) or 0


def _read_zip(path: Path, file: IO[bytes], start: int, length: int) -> tuple[Any, Callable[[Storage], int]]:
    try:
        with zipfile.ZipFile(_Directory(file)) as archive:
            if any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist()):
                raise InputError(f"{short_name(path)} is TorchScript", "a state dict", "save model.state_dict()")
            entries = _entries(path, archive.infolist(), length)
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise corrupt(path, "no data.pkl")
        root = pickles[0].removesuffix("data.pkl")

        def extent(name: str) -> tuple[int, int]:
            return _extent(path, entries, name, start, length)

        def read(name: str) -> bytes:
            at, size = extent(name)
            if size > MAX_PICKLE:
                raise ValueError(f"{name[:80]} of {size} bytes")
            file.seek(at - start)
            return file.read(size)

        order = read(root + "byteorder") if root + "byteorder" in entries else b"little"
        if order != b"little":
            found = f"{short_name(path)} has byte order {order[:20]!r}"
            raise InputError(found, "little", "save it on another machine")
        text = read(pickles[0])
    except _BROKEN_ZIP as error:
        raise corrupt(path, str(error)) from error

    def find(storage: Storage) -> int:
        at, size = extent(f"{root}data/{storage.key}")
        if size != (storage.start + storage.numel) * _item_size(storage.dtype):
            raise corrupt(path, f"storage {storage.key} has {size} bytes for {storage.numel} {storage.dtype}")
        return at

    return unpickle(io.BytesIO(text), path, _storage), find


class _Directory:
    """A zip file of which the directory is read, unless that is absurdly large."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY:
            raise ValueError(f"a directory of {size} bytes")
        return self._read(size)


def _entries(path: Path, found: Sequence[zipfile.ZipInfo], length: int) -> dict[str, zipfile.ZipInfo]:
    """The entries by name: every name once, each of them in the file, and none inside another."""
    end = 0
    for info in sorted(found, key=lambda info: info.header_offset):
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            what = f"{short_name(path)} has the compressed entry {info.filename[:80]}"
            raise InputError(what, "stored entries", "save it with torch.save")
        if info.header_offset < end:
            raise ValueError(f"the entry {info.filename[:80]!r} lies over another, or before the file")
        end = info.header_offset + 30 + info.compress_size
    if end > length:
        raise ValueError("an entry past its end")
    entries = {info.filename: info for info in found}
    if len(entries) < len(found):
        raise ValueError("two entries of one name")
    return entries


def _extent(path: Path, entries: Mapping[str, zipfile.ZipInfo], name: str, start: int, length: int) -> tuple[int, int]:
    """First byte and size of a stored entry, past its local header."""
    info = entries.get(name)
    if info is None:
        raise corrupt(path, f"no entry {name[:80]}")
    with open_input(path) as file:
        file.seek(start + info.header_offset)
        header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise corrupt(path, f"no local header of {name[:80]}")
    at = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if at + info.file_size > length:
        raise corrupt(path, f"the entry {name[:80]} lies past its end")
    return start + at, info.file_size


def _read_legacy(path: Path, file: IO[bytes], start: int, length: int) -> tuple[Any, Callable[[Storage], int]]:
    """The format before torch 1.6: magic, protocol, system, tree and storage keys as pickles, then the storages."""
    found: dict[str, int] = {}

    def remember(pid: Any) -> Any:
        storage = _storage(pid)
        if isinstance(storage, Storage):
            size = pid[4] * _item_size(storage.dtype)
            if found.setdefault(storage.key, size) != size:
                raise ValueError(f"storage {storage.key[:40]} of two sizes")
        return storage

    if any(unpickle(file, path) != expected for expected in (LEGACY_MAGIC, LEGACY_PROTOCOL)):
        found_instead = f"{short_name(path)} is a pickle that torch.save did not write"
        raise InputError(found_instead, "a file of torch.save", "save model.state_dict() with torch.save")
    system = unpickle(file, path)
    if not isinstance(system, Mapping) or system.get("little_endian") is not True:
        raise InputError(f"{short_name(path)} has big-endian data", "little-endian", "save it on another machine")
    tree = unpickle(file, path, remember)
    keys = unpickle(file, path)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(found):
        raise corrupt(path, "its storages do not match its tensors")
    starts = {}
    for key in keys:
        numel = int.from_bytes(file.read(8), "little")
        at = file.tell()
        if found[key] not in (numel * size for size in (1, 2, 4, 8, 16)):
            raise corrupt(path, f"storage {key[:40]} has {numel} elements for {found[key]} bytes")
        starts[key] = start + at
        file.seek(at + found[key])
    if file.tell() != length:
        raise corrupt(path, f"its storages end at byte {file.tell()}")
    return tree, lambda storage: starts[storage.key]


def _storage(pid: Any) -> Any:
    """What a persistent id of torch.save stands for: a storage, or the class of a module beside its source."""
    if not isinstance(pid, tuple) or len(pid) < 2:
        raise ValueError("a persistent id that is no storage")
    if pid[0] == "module" and isinstance(pid[1], Global):
        return pid[1]
    tag, kind, key, _, numel = pid[:5]
    if tag != "storage" or not isinstance(key, str) or not is_count(numel) or not isinstance(kind, Global):
        raise ValueError("a broken storage")
    _, before, inside = pid[5] if len(pid) > 5 and pid[5] is not None else (None, 0, numel)
    if not is_count(before) or not is_count(inside) or before + inside > numel:
        raise ValueError("a storage that is no part of its own")
    return Storage(STORAGE_DTYPES[kind.name], key, inside, before)


def _item_size(dtype: str) -> int:
    return DTYPES[dtype].itemsize if dtype in DTYPES else ITEM_SIZES.get(dtype, 1)


def is_count(value: Any) -> bool:
    """Whether a value can be an offset or a size."""
    return type(value) is int and 0 <= value < 1 << 62


def _strange_error(path: Path, name: str, tensor: TensorView | StrangeTensor) -> InputError:
    kind = tensor.kind if isinstance(tensor, StrangeTensor) else f"{tensor.dtype}-quantized"
    what = f"tensor {name[:60]!r} in {short_name(path)} is"
    if kind.startswith("complex"):
        found = f"{short_name(path)} holds complex-valued tensors ({name[:60]!r})"
        return InputError(found, "real ones", "complex-valued models are not supported")
    if kind.endswith("-quantized"):
        method = kind.removesuffix("-quantized")
        return quantized_error(path, "fp8" if method.startswith("float8") else method[:20], name)
    if kind == "meta":
        return InputError(f"{what} on the meta device, without data", "weights", "save it after they are loaded")
    return InputError(f"{what} {kind[:30]}", "a dense one", "save plain tensors of the CPU")


def write_torch(file: Path, tensors: Sequence[PlannedTensor], progress: ByteProgress | None) -> None:
    """A state dict as `torch.save` writes it: an OrderedDict in data.pkl, each storage a stored zip entry.

    Memory: the one block of a tensor that is being written.
    """
    keys: dict[str, str] = {}
    for tensor in tensors:
        keys[tensor.name] = str(len(keys)) if tensor.same_as is None else keys[tensor.same_as]
    root = "archive"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(f"{root}/data.pkl", _state_dict_pickle(tensors, keys))
        archive.writestr(f"{root}/byteorder", "little")
        for tensor in tensors:
            if tensor.same_as is not None:
                continue
            with archive.open(f"{root}/data/{keys[tensor.name]}", "w", force_zip64=True) as entry:
                tensor.write(entry)
            if progress is not None:
                progress(tensor.nbytes)
        archive.writestr(f"{root}/version", "3\n")


@dataclass(frozen=True, eq=False)
class _Made:
    """A value that an operation makes of others; what a persistent id stands for is not remembered."""

    parts: tuple[Any, ...]
    operation: bytes


def _state_dict_pickle(tensors: Sequence[PlannedTensor], keys: Mapping[str, str]) -> bytes:
    """The operations of protocol 2, as torch.save has them: `pickle` would import torch to name what is in it."""
    kinds = {dtype: Global("torch", name) for name, dtype in reversed(STORAGE_DTYPES.items())}
    rebuild, ordered_dict = Global("torch._utils", "_rebuild_tensor_v2"), Global("collections", "OrderedDict")
    values: list[Any] = [_Made((ordered_dict, ()), b"R")]
    for tensor in tensors:
        storage = ("storage", kinds[tensor.dtype.name], keys[tensor.name], "cpu", math.prod(tensor.shape))
        strides, hooks = contiguous_strides(tensor.shape), _Made((ordered_dict, ()), b"R")
        arguments = (_Made((storage,), b"Q"), 0, tensor.shape, strides, False, hooks)
        values += [tensor.name, _Made((rebuild, arguments), b"R")]
    out, memo = bytearray(b"\x80\x02"), dict[object, int]()
    _save(values[0], out, memo)
    for start in range(1, len(values), 2 * BATCH):
        batch = values[start : start + 2 * BATCH]
        out += b"(" if len(batch) > 2 else b""
        for value in batch:
            _save(value, out, memo)
        out += b"u" if len(batch) > 2 else b"s"
    return bytes(out + b".")


def _save(value: Any, out: bytearray, memo: dict[object, int]) -> None:
    """Make a value and remember it, or get it where it was made before; `memo` knows texts, and the ids of others."""
    known_as = value if isinstance(value, str) else id(value)
    if (index := memo.get(known_as)) is not None:
        out += b"h" + bytes([index]) if index < 256 else b"j" + index.to_bytes(4, "little")
        return
    if isinstance(value, int) or value == ():
        out += pickle.dumps(value, 2)[2:-1]
        return
    if isinstance(value, str):
        out += pickle.dumps(value, 2)[2:-3]
    elif isinstance(value, Global):
        out += f"c{value.module}\n{value.name}\n".encode()
    else:
        made = value if isinstance(value, _Made) else _Made(value, _TUPLES.get(len(value), b"t"))
        out += b"(" if made.operation == b"t" else b""
        for part in made.parts:
            _save(part, out, memo)
        out += made.operation
        if made.operation == b"Q":
            return
    index = memo[known_as] = len(memo)
    out += b"q" + bytes([index]) if index < 256 else b"r" + index.to_bytes(4, "little")
