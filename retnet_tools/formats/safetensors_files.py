"""safetensors: one file, or shards that an index names.

A header is parsed and checked against its file's size when a file is opened. `safetensors.torch.save_model` keeps one
of several names for the same tensor and notes the others in the file's metadata: they are names here too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from retnet_tools.errors import InputError
from retnet_tools.formats.content import quantized_error
from retnet_tools.formats.storage import StoredTensors, TensorLocation, contiguous_strides, load_json, unique_keys

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
        header = json.loads(text, object_pairs_hook=unique_keys)
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
    return with_aliases(tensors, metadata)


def with_aliases(tensors: Mapping[str, TensorLocation], metadata: Mapping[str, str]) -> StoredTensors:
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
        if Path(shard).name != shard or "\\" in shard or "\0" in shard or shard in ("", ".", ".."):
            raise InputError(f"{index} names the shard {shard!r}", "a file name inside the folder", "correct the index")
        path = index.parent / shard
        if not path.is_file():
            raise InputError(f"no shard {shard!r}, which {index.name} names", str(path), "fetch the missing shard")
        shards[shard] = open_shard(path)
        for name in shards[shard].locations.keys() - shards[shard].aliases.keys():
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
    metadata = {key: value for shard in shards.values() for key, value in shard.metadata.items()}
    return with_aliases(tensors, metadata)


def _location(path: Path, data_start: int, name: str, entry: Any) -> TensorLocation:
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(path, f"a broken header entry for {name!r}") from error
    dtype = SAFETENSORS_DTYPES.get(str(dtype_name))
    if dtype is None and str(dtype_name).startswith(("F8", "F4", "F6")):
        raise quantized_error(path, f"fp{str(dtype_name)[1]}", name)
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
