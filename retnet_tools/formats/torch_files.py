"""The containers of `torch.save`: a zip of a pickle and storages, and the older run of pickles before its storages.

Both give the tree with tensors described and not placed; `TorchFile.locate` places one. No tensor data is read.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from retnet_tools.errors import InputError
from retnet_tools.formats.content import quantized_error, short_name
from retnet_tools.formats.file_window import FileWindow
from retnet_tools.formats.pickles import corrupt, unpickle
from retnet_tools.formats.stand_ins import Global, Storage, StrangeTensor, TensorView
from retnet_tools.formats.storage import TensorLocation

STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}
ITEM_SIZES = {"complex64": 8, "complex128": 16, "qint32": 4}
DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}
# How large an expanded tensor, whose elements share memory, may be without a storage of its size.
EXPANDED_BYTES = 1 << 20
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
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
        if isinstance(tensor, StrangeTensor):
            raise _strange_error(self._path, name, tensor.kind)
        if tensor.dtype not in DTYPES:
            raise _dtype_error(self._path, name, tensor.dtype)
        dtype, storage = DTYPES[tensor.dtype], tensor.storage
        counts = (tensor.offset, *tensor.shape, *tensor.strides)
        if len(tensor.shape) != len(tensor.strides) or not all(map(_is_count, counts)):
            raise corrupt(self._path, "a tensor with a broken description")
        held = storage.numel * _item_size(storage.dtype) // dtype.itemsize
        if math.prod(tensor.shape) > max(held, EXPANDED_BYTES // dtype.itemsize):
            raise InputError(
                f"{short_name(self._path)} has a tensor of shape {list(tensor.shape)} in a storage of {held} elements",
                "an element of its own for each",
                "save contiguous tensors",
            )
        start = self._find(storage) + storage.start * _item_size(storage.dtype) + tensor.offset * dtype.itemsize
        location = TensorLocation(self._path, start, tuple(tensor.shape), dtype, tuple(tensor.strides))
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
    with path.open("rb") as file:
        size = path.stat().st_size
        length = size if length is None else length
        region = file if start == 0 and length == size else io.BufferedReader(FileWindow(file, start, length))
        is_zip = region.read(4) == b"PK\x03\x04"
        region.seek(0)
        read = _read_zip if is_zip else _read_legacy
        return TorchFile(path, *read(path, region, start, length))


def _read_zip(path: Path, file: Any, start: int, length: int) -> tuple[Any, Callable[[Storage], int]]:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise corrupt(path, "no data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if root + "constants.pkl" in entries:
            raise InputError(f"{short_name(path)} is TorchScript", "a state dict", "save model.state_dict()")

        def extent(name: str) -> tuple[int, int]:
            return _extent(path, entries, name, start, length)

        order = _read(path, extent(root + "byteorder")) if root + "byteorder" in entries else b"little"
        if order != b"little":
            raise InputError(
                f"{short_name(path)} has byte order {order[:20]!r}", "little", "save it on another machine"
            )
        text = _read(path, extent(pickles[0]))
    except _BROKEN_ZIP as error:
        raise corrupt(path, str(error)) from error

    def find(storage: Storage) -> int:
        at, size = extent(f"{root}data/{storage.key}")
        if size != (storage.start + storage.numel) * _item_size(storage.dtype):
            raise corrupt(path, f"storage {storage.key} has {size} bytes for {storage.numel} {storage.dtype}")
        return at

    return unpickle(io.BytesIO(text), path, _storage), find


def _read(path: Path, extent: tuple[int, int]) -> bytes:
    with path.open("rb") as file:
        file.seek(extent[0])
        return file.read(extent[1])


def _extent(path: Path, entries: Mapping[str, zipfile.ZipInfo], name: str, start: int, length: int) -> tuple[int, int]:
    """First byte and size of a stored entry, past its local header."""
    info = entries.get(name)
    if info is None:
        raise corrupt(path, f"no entry {name[:80]}")
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise InputError(
            f"{short_name(path)} has the compressed entry {name[:80]}",
            "stored entries",
            "save it with torch.save",
        )
    with path.open("rb", buffering=0) as file:
        file.seek(start + max(0, info.header_offset))
        header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise corrupt(path, f"no local header of {name[:80]}")
    at = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if at + info.file_size > length:
        raise corrupt(path, f"the entry {name[:80]} lies past its end")
    return start + at, info.file_size


def _read_legacy(path: Path, file: Any, start: int, length: int) -> tuple[Any, Callable[[Storage], int]]:
    """The format before torch 1.6: magic, protocol, system, tree and storage keys as pickles, then the storages."""
    found: dict[str, int] = {}

    def remember(pid: Any) -> Any:
        storage = _storage(pid)
        if isinstance(storage, Storage):
            size = pid[4] * _item_size(storage.dtype)
            if found.setdefault(storage.key, size) != size:
                raise ValueError(f"storage {storage.key[:40]} of two sizes")
        return storage

    for expected in (LEGACY_MAGIC, LEGACY_PROTOCOL):
        if unpickle(file, path) != expected:
            raise InputError(
                f"{short_name(path)} is a pickle that torch.save did not write",
                "a file of torch.save",
                "save model.state_dict() with torch.save",
            )
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
        if numel > length or (numel and found[key] % numel) or (found[key] > 0) != (numel > 0):
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
    if tag != "storage" or not isinstance(key, str) or not _is_count(numel) or not isinstance(kind, Global):
        raise ValueError("a broken storage")
    view = pid[5] if len(pid) > 5 else None
    if view is None:
        return Storage(STORAGE_DTYPES[kind.name], key, numel, 0)
    _, before, inside = view
    if not _is_count(before) or not _is_count(inside) or before + inside > numel:
        raise ValueError("a storage that is no part of its own")
    return Storage(STORAGE_DTYPES[kind.name], key, inside, before)


def _item_size(dtype: str) -> int:
    return DTYPES[dtype].itemsize if dtype in DTYPES else ITEM_SIZES.get(dtype, 1)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _dtype_error(path: Path, name: str, dtype: str) -> InputError:
    if dtype.startswith("complex"):
        return InputError(
            f"{short_name(path)} holds complex-valued tensors ({name[:60]!r})",
            "real ones",
            "complex-valued models are not supported",
        )
    return quantized_error(path, "fp8" if dtype.startswith("float8") else dtype[:20], name)


def _strange_error(path: Path, name: str, kind: str) -> InputError:
    if kind == "meta":
        return InputError(
            f"tensor {name[:60]!r} in {short_name(path)} is on the meta device, without data",
            "weights",
            "save it after they are loaded",
        )
    if kind == "quantized" or "Quant" in kind or "Affine" in kind or "HQQ" in kind:
        return quantized_error(path, "torch" if kind == "quantized" else kind[:30], name)
    return InputError(
        f"tensor {name[:60]!r} in {short_name(path)} is {kind[:30]}", "a dense one", "save plain tensors of the CPU"
    )
