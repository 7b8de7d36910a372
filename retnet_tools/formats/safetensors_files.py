"""safetensors, read and written: one file, or shards that an index names.

A header is parsed and checked against its file's size when a file is opened. `safetensors.torch.save_model` keeps one
of several names for the same tensor and notes the others in the file's metadata: they are names here too.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from retnet_tools.errors import InputError
from retnet_tools.formats import storage
from retnet_tools.formats.content import quantized_error
from retnet_tools.formats.storage import LazyTensor, PlannedTensor, StoredTensors, TensorLocation
from retnet_tools.inputs import MAX_DOCUMENT, load_json, open_input, parse_json, part_path
from retnet_tools.progress import ByteProgress
from retnet_tools.weights import FileRegion

_NAMES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
DTYPES = dict(zip(_NAMES, storage.DTYPES.values(), strict=True))
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def open_safetensors(path: Path) -> StoredTensors:
    """The tensors of one safetensors file, its header checked against its size.

    Raises:
        InputError: truncated, with trailing bytes, overlapping tensors, an unknown dtype or a broken header.
    """
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_DOCUMENT, size - 8):
            found = f"{path} has {size} bytes and names a header of {length}"
            expected = f"a complete safetensors file, its header of at most {MAX_DOCUMENT}"
            raise InputError(found, expected, "fetch it again")
        text = file.read(length)
    try:
        header = parse_json(text)
    except ValueError as error:
        raise _broken(path, f"a header that cannot be read ({error})") from error
    if not isinstance(header, dict):
        raise _broken(path, "a header that is no object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "metadata that is no object of strings")
    tensors = {name: _location(path, 8 + length, name, entry) for name, entry in header.items()}
    end = 8 + length
    for location in sorted(tensors.values(), key=lambda t: (t.offset, t.span)):
        if location.offset != end:
            raise _broken(path, f"tensor data that starts at byte {location.offset} where the one before ends at {end}")
        end += location.nbytes
    if end != size:
        raise InputError(f"{path} has {size} bytes", f"{end}, as its header says", "fetch it again")
    return _with_aliases(tensors, metadata)


def _with_aliases(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> StoredTensors:
    """Tensors, and the further names that metadata gives some of them: `{"removed.name": "kept.name"}`."""
    aliases = {name: kept for name, kept in metadata.items() if kept in tensors and name not in tensors}
    return StoredTensors({**tensors, **{name: tensors[kept] for name, kept in aliases.items()}}, metadata, aliases)


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
        if (path := part_path(index.parent, shard)) is None:
            raise InputError(f"{index} names the shard {shard!r}", "a file name inside the folder", "correct the index")
        if not path.is_file():
            raise InputError(f"no shard {shard!r}, which {index.name} names", str(path), "fetch the missing shard")
        shards[shard] = open_shard(path)
        for name in shards[shard].locations.keys() - shards[shard].aliases.keys():
            if weight_map.get(name) != shard:
                expected = f"only what {index.name} places there"
                raise InputError(f"{path} holds {name!r}", expected, "fetch the index again")
    tensors = {}
    for name, shard in weight_map.items():
        if name not in shards[shard].locations:
            expected = f"it, as {index.name} says"
            raise InputError(f"{index.parent / shard} has no tensor {name!r}", expected, "fetch it again")
        tensors[name] = shards[shard].locations[name]
    return _with_aliases(tensors, {key: value for part in shards.values() for key, value in part.metadata.items()})


def _location(path: Path, data_start: int, name: str, entry: Any) -> TensorLocation:
    try:
        kind, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(path, f"a broken header entry for {name!r}") from error
    dtype = DTYPES.get(kind)
    if dtype is None and kind.startswith(("F8", "F4", "F6")):
        raise quantized_error(path, f"fp{kind[1]}", name)
    if dtype is None:
        raise InputError(f"tensor {name!r} in {path} is {kind}", "F16, BF16, F32 or F64", "convert it to one of them")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise _broken(path, f"{end - begin} bytes for {name!r} of shape {list(shape)} in {kind}")
    return TensorLocation(shape, dtype, path, data_start + begin, storage.contiguous_strides(shape))


def _broken(path: Path, what: str) -> InputError:
    return InputError(f"{path} has {what}", "a valid safetensors file", "fetch it again")


def write_safetensors(
    file: Path,
    tensors: Sequence[PlannedTensor],
    progress: ByteProgress | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """One safetensors file. Memory: the one block of a tensor that is being written.

    Args:
        progress: called with the bytes of each tensor once it is written.
        metadata: what to say beside the tensors; None says that they are torch's.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for tensor in tensors:
        offsets = [end, end := end + tensor.nbytes]
        header[tensor.name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb", buffering=0) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            if tensor.copied is None or not _copy_region(out, tensor.copied):
                tensor.write(out)
            if progress is not None:
                progress(tensor.nbytes)


def _copy_region(out: FileIO, region: FileRegion) -> bool:
    """Let the kernel copy a region to the end of a file; False, with nothing written, where it cannot."""
    if not hasattr(os, "copy_file_range"):
        return False
    done = 0
    with open_input(region.path) as source:
        while (left := region.nbytes - done) > 0:
            try:
                count = os.copy_file_range(source.fileno(), out.fileno(), left, offset_src=region.offset + done)
            except OSError as error:
                if done == 0 and error.errno in _NO_KERNEL_COPY:
                    return False
                raise
            if count == 0:
                raise storage.ends_early(region.path, left)
            done += count
    return True
