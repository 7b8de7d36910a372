"""The two containers that checkpoints are written in, streamed: safetensors, and the zip of `torch.save`.

Memory of both: the one block of a tensor that is being written.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO, Any

import numpy as np

from retnet_tools.errors import InputError
from retnet_tools.formats.safetensors_files import SAFETENSORS_DTYPES
from retnet_tools.formats.storage import contiguous_strides
from retnet_tools.progress import ByteProgress
from retnet_tools.weights import Array, FileRegion, TensorInfo

_SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_TORCH_STORAGES = {
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
}
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write, under the name that the file gives it.

    Attributes:
        blocks: gives the data in pieces along the first axis, contiguous and of `info`'s dtype.
        region: where exactly these bytes lie already, to be copied without passing through memory.
        same_as: the name of an earlier tensor whose storage this one shares (torch files only).
    """

    name: str
    info: TensorInfo
    blocks: Callable[[], Iterator[Array]]
    region: FileRegion | None = None
    same_as: str | None = None


def planned(name: str, array: Array) -> PlannedTensor:
    """An array in memory, to write under a name."""
    contiguous = np.ascontiguousarray(array)
    return PlannedTensor(name, TensorInfo(array.shape, array.dtype), lambda: iter((contiguous,)))


def write_safetensors(
    file: Path,
    tensors: Sequence[PlannedTensor],
    progress: ByteProgress | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """One safetensors file.

    Args:
        progress: called with the bytes of each tensor once it is written.
        metadata: what to say beside the tensors; None says that they are torch's.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for tensor in tensors:
        offsets = [end, end + tensor.info.nbytes]
        dtype = _SAFETENSORS_NAMES[tensor.info.dtype]
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.info.shape), "data_offsets": offsets}
        end += tensor.info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb", buffering=0) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            if tensor.region is None or not _copy_region(out, tensor.region):
                _write_blocks(out, tensor)
            if progress is not None:
                progress(tensor.info.nbytes)


def write_torch(file: Path, tensors: Sequence[PlannedTensor], progress: ByteProgress | None) -> None:
    """A state dict as `torch.save` writes it: an OrderedDict in data.pkl, each storage a stored zip entry."""
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
                _write_blocks(entry, tensor)
            if progress is not None:
                progress(tensor.info.nbytes)
        archive.writestr(f"{root}/version", "3\n")


def _copy_region(out: FileIO, region: FileRegion) -> bool:
    """Let the kernel copy a region to the end of a file; False, with nothing written, where it cannot."""
    if not hasattr(os, "copy_file_range"):
        return False
    done = 0
    with region.path.open("rb") as source:
        while done < region.nbytes:
            try:
                count = os.copy_file_range(
                    source.fileno(), out.fileno(), region.nbytes - done, offset_src=region.offset + done
                )
            except OSError as error:
                if done == 0 and error.errno in _NO_KERNEL_COPY:
                    return False
                raise
            if count == 0:
                raise InputError(
                    f"{region.path} ends {region.nbytes - done} bytes inside a tensor",
                    "the size it had when it was opened",
                    "fetch or copy it again",
                )
            done += count
    return True


def _write_blocks(out: IO[bytes], tensor: PlannedTensor) -> None:
    written = 0
    for block in tensor.blocks():
        if block.dtype != tensor.info.dtype:
            raise InputError(f"tensor {tensor.name!r} gave {block.dtype}", str(tensor.info.dtype))
        out.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        written += block.nbytes
    if written != tensor.info.nbytes:
        raise InputError(f"tensor {tensor.name!r} gave {written} bytes", f"{tensor.info.nbytes}")


def _state_dict_pickle(tensors: Sequence[PlannedTensor], keys: dict[str, str]) -> bytes:
    import torch

    class _Storage:
        def __init__(self, tensor: PlannedTensor) -> None:
            numel = tensor.info.nbytes // tensor.info.dtype.itemsize
            kind = getattr(torch, _TORCH_STORAGES[tensor.info.dtype.name])
            self.id = ("storage", kind, keys[tensor.name], "cpu", numel)

    class _Tensor:
        def __init__(self, tensor: PlannedTensor) -> None:
            self.tensor = tensor

        def __reduce__(self) -> tuple[Any, ...]:
            shape = self.tensor.info.shape
            no_hooks: OrderedDict[str, Any] = OrderedDict()
            arguments = (_Storage(self.tensor), 0, shape, contiguous_strides(shape), False, no_hooks)
            return torch._utils._rebuild_tensor_v2, arguments

    class _Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.id if isinstance(obj, _Storage) else None

    buffer = io.BytesIO()
    # Protocol 2 is torch.save's own.
    _Pickler(buffer, protocol=2).dump(OrderedDict((tensor.name, _Tensor(tensor)) for tensor in tensors))
    return buffer.getvalue()
