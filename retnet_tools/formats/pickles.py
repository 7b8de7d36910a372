"""Files of `torch.save`, read without torch and without running anything they hold.

The pickle inside names classes and functions; only the few that describe tensors are known here, each as an inert
stand-in, and any other name is refused. Tensors become `TensorLocation`s: their data is not read.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from retnet_tools.errors import InputError
from retnet_tools.formats.storage import StoredTensors, TensorLocation

STORAGE_DTYPES: dict[str, np.dtype[Any]] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# fairseq keeps numpy scalars among its training metrics; they are read over, not rebuilt.
IGNORED_GLOBALS = frozenset(
    {"numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "_codecs.encode"}
)
STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict")
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


@dataclass(frozen=True)
class TorchFile:
    """What `torch.save` wrote: the tensors of its state dict, and the other entries beside them (fairseq's `cfg`)."""

    tensors: StoredTensors
    metadata: Mapping[str, Any]


class Storage(NamedTuple):
    """A flat run of elements in a file, which several tensors may share."""

    dtype: np.dtype[Any]
    key: str
    numel: int


def open_torch(path: Path) -> TorchFile:
    """The state dict of a `.pt`, `.pth` or `.bin` file: the tree itself, or its `model` or `state_dict`.

    Memory: the names and shapes, no data.

    Raises:
        InputError: a pickle that names anything but tensors and plain data, a corrupt or truncated file, compressed
            entries, big-endian data, and a file that holds no state dict.
    """
    with path.open("rb") as file:
        start = file.read(4)
    tree = _read_zip(path) if start == b"PK\x03\x04" else _read_legacy(path)
    if not isinstance(tree, Mapping):
        raise InputError(f"{path} holds {type(tree).__name__}", "a dict of tensors", "save model.state_dict()")
    key = next((k for k in STATE_DICT_KEYS if isinstance(tree.get(k), Mapping)), None)
    state = tree if key is None else tree[key]
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, TensorLocation):
            raise InputError(
                f"{path} holds {name!r}, which is no tensor", "a state dict of named tensors", "save model.state_dict()"
            )
    if not state:
        raise InputError(f"{path} holds no tensors", "a state dict", "save model.state_dict()")
    rest = {} if key is None else {k: v for k, v in tree.items() if k != key}
    return TorchFile(StoredTensors(state), rest)


def attributes(value: Any) -> dict[str, Any] | None:
    """The entries of a dict or of a pickled `argparse.Namespace`; None for anything else."""
    if isinstance(value, _Namespace):
        return dict(vars(value))
    return dict(value) if isinstance(value, Mapping) else None


class _Dict(dict[Any, Any]):
    """Stands for `OrderedDict`: without attributes, whatever a pickle would set on it."""

    __slots__ = ()

    def __setstate__(self, _: Any) -> None: ...


class _Namespace:
    """Stands for `argparse.Namespace`: a bag of attributes."""


class _Ignored:
    """Stands for an object that is read over."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


class _InertUnpickler(pickle.Unpickler):
    """Rebuilds tensors as locations; every other global is refused.

    A pickle can set attributes on whatever it names. So the stand-ins are made anew each time, or are strings and
    tuples, which take none.
    """

    def __init__(self, file: IO[bytes], path: Path, find_storage: Callable[[Storage], int]) -> None:
        super().__init__(file, encoding="utf-8")
        self._path, self._find_storage = path, find_storage

    def find_class(self, module: str, name: str) -> Any:
        qualified = f"{module}.{name}"
        if module == "torch" and name in STORAGE_DTYPES:
            return name
        if qualified in IGNORED_GLOBALS:
            return type("Ignored", (_Ignored,), {})
        known: dict[str, Callable[[], Any]] = {
            "collections.OrderedDict": lambda: type("OrderedDict", (_Dict,), {"__slots__": ()}),
            "torch.Size": lambda: tuple,
            "argparse.Namespace": lambda: type("Namespace", (_Namespace,), {}),
            "torch._utils._rebuild_tensor_v2": lambda: lambda *args: self._tensor(*args[:4]),
            "torch._utils._rebuild_parameter": lambda: lambda *args: args[0],
        }
        if module == "torch" and name.startswith("Complex"):
            raise InputError(
                f"{self._path} holds complex-valued tensors ({name})",
                "real ones",
                "complex-valued models are not supported",
            )
        if qualified not in known:
            raise InputError(
                f"refused pickle global {qualified!r} in {self._path}",
                "tensors and plain data only",
                "load it where you trust it and save model.state_dict()",
            )
        return known[qualified]()

    def persistent_load(self, pid: Any) -> Storage:
        tag, kind, key, _, numel = pid[:5]
        if tag != "storage" or not isinstance(key, str) or not _is_count(numel):
            raise ValueError(f"the storage {pid!r}")
        if len(pid) > 5 and pid[5] is not None:
            raise ValueError("a storage that is a view of another")
        return Storage(STORAGE_DTYPES[kind], key, numel)

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> TensorLocation:
        counts = (offset, *shape, *strides)
        if not isinstance(storage, Storage) or len(shape) != len(strides) or not all(map(_is_count, counts)):
            raise ValueError("a tensor with a broken description")
        if math.prod(shape) > storage.numel:
            raise InputError(
                f"{self._path} has a tensor of shape {list(shape)} in a storage of {storage.numel} elements",
                "an element of its own for each",
                "save contiguous tensors",
            )
        start = self._find_storage(storage) + offset * storage.dtype.itemsize
        location = TensorLocation(self._path, start, tuple(shape), storage.dtype, tuple(strides))
        if offset + location.span > storage.numel:
            raise ValueError(f"a tensor of {location.span} elements at {offset} in a storage of {storage.numel}")
        return location


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _unpickle(file: IO[bytes], path: Path, find_storage: Callable[[Storage], int]) -> Any:
    try:
        start = file.tell()
        _check_memo(file)
        file.seek(start)
        return _InertUnpickler(file, path, find_storage).load()
    except InputError:
        raise
    except Exception as error:  # a corrupt pickle can raise anything
        raise _corrupt(path, f"{type(error).__name__}: {error}") from error


def _check_memo(file: IO[bytes]) -> None:
    """Refuse memo indices beyond the operations so far: the unpickler would reserve memory up to any index."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > count:
            raise ValueError(f"memo index {argument} after {count} operations")


def _corrupt(path: Path, why: str) -> InputError:
    size = path.stat().st_size
    return InputError(
        f"{path} ({size} bytes) is truncated, corrupt or no torch file ({why})",
        "a file of torch.save",
        "fetch it again",
    )


def _read_zip(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            entries = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise _corrupt(path, "no data.pkl")
            root = pickles[0].removesuffix("data.pkl")
            order = _record(path, file, entries, root + "byteorder") if root + "byteorder" in entries else b"little"
            if order != b"little":
                raise InputError(
                    f"{path} has byte order {order[:16]!r}", "little", "save it on a little-endian machine"
                )
            text = _record(path, file, entries, root + "data.pkl")

            def find_storage(storage: Storage) -> int:
                start, size = _extent(path, file, entries, f"{root}data/{storage.key}")
                if storage.numel * storage.dtype.itemsize > size:
                    raise _corrupt(path, f"storage {storage.key} has {size} bytes for {storage.numel} {storage.dtype}")
                return start

            return _unpickle(io.BytesIO(text), path, find_storage)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise _corrupt(path, str(error)) from error


def _record(path: Path, file: IO[bytes], entries: Mapping[str, zipfile.ZipInfo], name: str) -> bytes:
    start, size = _extent(path, file, entries, name)
    file.seek(start)
    return file.read(size)


def _extent(path: Path, file: IO[bytes], entries: Mapping[str, zipfile.ZipInfo], name: str) -> tuple[int, int]:
    """First byte and size of a stored entry, past its local header."""
    info = entries.get(name)
    if info is None:
        raise _corrupt(path, f"no entry {name}")
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise InputError(
            f"{path} has the compressed or encrypted entry {name}", "stored entries", "save it with torch.save"
        )
    file.seek(max(0, info.header_offset))
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise _corrupt(path, f"no local header of {name}")
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + info.file_size > path.stat().st_size:
        raise _corrupt(path, f"the entry {name} lies past its end")
    return start, info.file_size


def _read_legacy(path: Path) -> Any:
    """The format before torch 1.6: magic, protocol, system, tree and storage keys as pickles, then the storages."""
    found: dict[str, Storage] = {}

    def remember(storage: Storage) -> int:
        found[storage.key] = storage
        return 0

    def refuse(_: Storage) -> int:
        raise ValueError("a storage in the header")

    with path.open("rb") as file:
        for expected in (LEGACY_MAGIC, LEGACY_PROTOCOL):
            if _unpickle(file, path, refuse) != expected:
                raise _corrupt(path, "a pickle that torch.save did not write")
        system = _unpickle(file, path, refuse)
        if not isinstance(system, Mapping) or system.get("little_endian") is not True:
            raise InputError(f"{path} has big-endian data", "little-endian", "save it on a little-endian machine")
        tree_at = file.tell()
        _unpickle(file, path, remember)
        keys = _unpickle(file, path, refuse)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(found):
            raise _corrupt(path, "its storages do not match its tensors")
        starts = {}
        for key in keys:
            numel = int.from_bytes(file.read(8), "little")
            if numel != found[key].numel:
                raise _corrupt(path, f"storage {key} has {numel} elements, not {found[key].numel}")
            starts[key] = file.tell()
            file.seek(numel * found[key].dtype.itemsize, io.SEEK_CUR)
        if file.tell() != path.stat().st_size:
            raise _corrupt(path, f"its storages end at byte {file.tell()}")
        file.seek(tree_at)
        return _unpickle(file, path, lambda storage: starts[storage.key])
