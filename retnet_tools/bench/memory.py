"""How much memory of a GPU is in use, and what the GPU is."""

from __future__ import annotations

from retnet_tools.errors import ProviderError
from retnet_tools.runtime.cuda import CudaDriver, cuda_runtime
from retnet_tools.runtime.providers import Device


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
