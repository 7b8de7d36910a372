"""How much memory this process and a GPU use, and what the GPU is."""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path

from retnet_tools.errors import ProviderError
from retnet_tools.runtime.cuda import CudaDriver, cuda_runtime
from retnet_tools.runtime.providers import Device

_CLEAR_REFS = Path("/proc/self/clear_refs")


def trim() -> None:
    """Give back what the allocator keeps for later and nobody uses, where it offers that."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> bool:
    """Let the peak start again from what is in use now; whether the system did so."""
    trim()
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_resident() -> int | None:
    """The most bytes that were resident since `reset_peak`, mapped pages of files included; None where the system does
    not say. Without a reset it includes what loading took."""
    return _status("VmHWM")


def anonymous_resident() -> int | None:
    """Bytes that are resident now and of no file; None where the system does not say."""
    return _status("RssAnon")


def device_used(device: Device) -> int | None:
    """Bytes in use on a GPU, by all processes; None for the CPU, or where the CUDA runtime does not say."""
    found = _device_memory(device)
    return None if found is None else found[1] - found[0]


def device_free(device: Device) -> int | None:
    """Bytes free on a GPU; None for the CPU, or where the CUDA runtime does not say."""
    found = _device_memory(device)
    return None if found is None else found[0]


def device_name(device: Device) -> str | None:
    """A GPU's name; None for the CPU, or where the CUDA driver does not say."""
    if device.kind == "cpu":
        return None
    try:
        return CudaDriver().devices()[device.index].name
    except (ProviderError, IndexError):
        return None


def _status(name: str) -> int | None:
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        if found := re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE):
            return int(found[1]) * 1024
    return None


def _device_memory(device: Device) -> tuple[int, int] | None:
    """Bytes free and in all."""
    if device.kind == "cpu":
        return None
    try:
        return cuda_runtime(device.index).memory()
    except ProviderError:
        return None
