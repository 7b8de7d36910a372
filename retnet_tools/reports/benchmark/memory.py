"""How much memory this process and a GPU use, and what the GPU is."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from pathlib import Path

from retnet_tools.errors import ProviderError
from retnet_tools.runtime.cuda import CudaDriver, cuda_runtime
from retnet_tools.runtime.providers import Device

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]


def reset_peak() -> None:
    """Let the peak start again from what is in use now, where the system offers that."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        # What the allocator keeps for later is in nobody's use.
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_resident() -> int | None:
    """The most bytes that were resident since `reset_peak`, mapped pages of files included.

    Since the process began where the kernel cannot start again; None where the system does not say.
    """
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        if found := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):
            return int(found[1]) * 1024
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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


def _device_memory(device: Device) -> tuple[int, int] | None:
    """Bytes free and in all."""
    if device.kind == "cpu":
        return None
    try:
        return cuda_runtime(device.index).memory()
    except ProviderError:
        return None
