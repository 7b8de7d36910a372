"""What ONNX Runtime, CUDA and its libraries fail of, as types. Nothing else reads the words of their errors."""

from __future__ import annotations

import re

from retnet_tools.errors import ProviderError

_OUT_OF_MEMORY = (
    "out of memory",
    r"[Ff]ailed to allocate memory",
    "Available memory of [0-9]+ is smaller",
    "cudaErrorMemoryAllocation",
    r"CUDA failure 2\b",
    "CUBLAS_STATUS_ALLOC_FAILED",
    r"CUDNN_STATUS_\w*ALLOC\w*",
)
_NO_KERNEL = ("NOT_IMPLEMENTED", "IsNodeCompatibleWithProvider")


class OutOfMemoryError(ProviderError):
    """A device had no memory left (exit 4)."""


class NoKernelError(ProviderError):
    """A provider has no kernel for a node and its types (exit 4)."""


class CaptureError(ProviderError):
    """A graph could not be captured; kernel by kernel it may run (exit 4)."""


def failure_type(error: BaseException) -> type[ProviderError]:
    """The type that an error of another library is; `ProviderError` for one that says nothing of these."""
    if isinstance(error, ProviderError):
        return type(error)
    for patterns, kind in ((_OUT_OF_MEMORY, OutOfMemoryError), (_NO_KERNEL, NoKernelError)):
        if re.search("|".join(patterns), one_line(error)):
            return kind
    return ProviderError


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a device's memory did not suffice: an error says so, or one that it came from."""
    return error is not None and (failure_type(error) is OutOfMemoryError or is_out_of_memory(error.__cause__))


def one_line(error: BaseException) -> str:
    """What an error says."""
    return " ".join(str(error).split())
