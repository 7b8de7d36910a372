"""Execution providers: a row each. What was asked for, what was got, and never something else in silence."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from retnet_tools.errors import ProviderError, UsageError
from retnet_tools.graph.contract import DECODER_FILE, OPSET, STEP_FILE
from retnet_tools.graph.manifest import Manifest
from retnet_tools.runtime import cuda, installation


class CpuFallbackWarning(UserWarning):
    """Something runs on the CPU that was asked for on CUDA, as `Device.cpu_fallback` allows."""


@dataclass(frozen=True)
class Device:
    """A device as named on the command line: `cpu` or `cuda[:n]`.

    Attributes:
        kind: name of its provider.
        cpu_fallback: whether what cannot run there may run on the CPU; `CpuFallbackWarning` says so then.
    """

    kind: str
    index: int = 0
    cpu_fallback: bool = False

    @property
    def provider(self) -> Provider:
        """What runs graphs on it."""
        return PROVIDERS[self.kind]

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}" if self.provider.numbered else self.kind


@dataclass(frozen=True)
class Provider:
    """What runs graphs on devices of a kind.

    Attributes:
        name: as `--device` has it.
        onnxruntime: its name in ONNX Runtime.
        numbered: whether there may be several such devices, as `name:1`.
        step_file: the graph that steps run on. Sessions of the CPU pack weights anew, so that one graph serves all;
            CUDA can capture step.onnx, which has no branches, and sessions share weights there.
        in_place: whether its kernels are known to read a state before they write it.
        eager_reason: why its steps are never captured; None where they can be.
        without_kernel: what to do where it has no kernel for a graph.
        settings: entries of a session's configuration.
        options: its own options for a device, and for whether graphs are captured.
        check: as `check_device`.
        check_model: raises a `ProviderError` where it cannot run the retention of an export.
        memory: bytes free and in all of a device, by its number; None where it is the machine's own.
    """

    name: str
    onnxruntime: str
    numbered: bool
    step_file: str
    in_place: bool
    eager_reason: str | None
    without_kernel: str
    settings: tuple[tuple[str, str], ...] = ()
    options: Callable[[Device, bool], dict[str, str]] = lambda device, captured: {}
    check: Callable[[Device], None] = lambda device: None
    check_model: Callable[[Manifest, Device], None] = lambda manifest, device: None
    memory: Callable[[int], tuple[int, int]] | None = None


def parse_device(text: str, *, cpu_fallback: bool = False) -> Device:
    """`cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"([a-z]+)(?::(\d{1,4}))?", text.strip().lower())
    provider = PROVIDERS.get(match[1]) if match else None
    if match is None or provider is None or (match[2] and not provider.numbered):
        names = [name for row in PROVIDERS.values() for name in (row.name, f"{row.name}:N")[: 1 + row.numbered]]
        raise UsageError(f"device {text!r}", f"{', '.join(names[:-1])} or {names[-1]}")
    return Device(provider.name, int(match[2] or 0), cpu_fallback and provider is not CPU)


def check_device(device: Device) -> None:
    """Check that a device can be had, as far as can be told without opening a graph.

    Raises:
        ProviderError: what is missing.
    """
    device.provider.check(device)


def usable_device(device: Device) -> Device:
    """The device, or the CPU where it cannot be had and `cpu_fallback` allows that, which a warning says.

    Raises:
        ProviderError: as `check_device`.
    """
    try:
        check_device(device)
    except ProviderError as error:
        if not device.cpu_fallback:
            raise
        return cpu_instead(error)
    return device


def cpu_instead(error: ProviderError) -> Device:
    """The CPU, with a warning that says why not CUDA."""
    warnings.warn(f"{error}; running on the CPU, as --allow-cpu-fallback says", CpuFallbackWarning, stacklevel=2)
    return Device(CPU.name)


def _check_cuda(device: Device) -> None:
    import onnxruntime

    if CUDA.onnxruntime not in onnxruntime.get_available_providers():
        packages = installation.packages_in_use()
        clash = installation.package_clash(packages)
        raise ProviderError(
            f"this onnxruntime has no CUDA provider{f': {clash}' if clash else ''}",
            "the package onnxruntime-gpu" + (" alone" if clash else ""),
            f"{installation.repair(packages)}, or use --device cpu",
        )
    if missing := [name for name, path in cuda.cuda_libraries().items() if path is None]:
        raise ProviderError(
            f"the CUDA provider cannot load {', '.join(missing)}",
            f"an NVIDIA driver, CUDA {cuda.cuda_major()} and cuDNN 9",
            "install what is missing (pip install 'onnxruntime-gpu[cuda,cudnn]' brings all but the driver), "
            "or use --device cpu",
        )
    driver = cuda.CudaDriver()
    if int(driver.cuda_version.split(".")[0]) < cuda.cuda_major():
        raise ProviderError(
            f"the NVIDIA driver runs CUDA up to {driver.cuda_version}",
            f"CUDA {cuda.cuda_major()}, which this onnxruntime is built for",
            "update the driver, or use --device cpu",
        )
    count = len(driver.devices())
    if device.index >= count:
        names = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ProviderError(
            f"no device {device}" if count else "the NVIDIA driver finds no device",
            names if count else "a GPU, not hidden by CUDA_VISIBLE_DEVICES",
            "" if count else "or use --device cpu",
        )


def _check_linear_attention(manifest: Manifest, device: Device) -> None:
    """LinearAttention, which exports for the CPU have, refuses some shapes on CUDA."""
    if (manifest.ops == "standard" and manifest.opset == OPSET) or manifest.device == CUDA.name:
        return
    # With onnx_ir, half a second to import: for graphs on a GPU.
    from retnet_tools.graph.cuda_ops import step_kernel, tokens_kernel

    _check_cuda(device)
    limit = cuda.CudaDriver().devices()[device.index].shared_memory_bytes
    heads = manifest.config.head_k_dim, manifest.config.head_v_dim
    found = None
    if step_kernel(*heads, limit) is None:
        found = f"heads of {heads[0]} x {heads[1]} in an export for the CPU"
    elif manifest.config.key_decay and tokens_kernel(*heads, limit) is None:
        # Prompts by a gamma of each head are matrix products.
        found = f"prompts of {heads[0]} x {heads[1]} heads with a gamma of each key dimension in an export for the CPU"
    if found is not None:
        raise ProviderError(found, "shapes that LinearAttention takes on CUDA", "export with --device cuda")


def _cuda_options(device: Device, captured: bool) -> dict[str, str]:
    return {
        "device_id": str(device.index),
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": str(int(captured)),
    }


CPU = Provider(
    name="cpu",
    onnxruntime="CPUExecutionProvider",
    numbered=False,
    step_file=DECODER_FILE,
    in_place=True,
    eager_reason="it runs on the CPU",
    without_kernel="the CPU provider has none for bfloat16: export with --dtype fp32 or fp16",
)
CUDA = Provider(
    name="cuda",
    onnxruntime="CUDAExecutionProvider",
    numbered=True,
    step_file=STEP_FILE,
    in_place=False,
    eager_reason=None,
    without_kernel="export with --device cuda, or with --dtype fp32",
    settings=(("session.use_device_allocator_for_initializers", "1"),),
    options=_cuda_options,
    check=_check_cuda,
    check_model=_check_linear_attention,
    memory=lambda index: cuda.cuda_runtime(index).memory(),
)
PROVIDERS = {provider.name: provider for provider in (CPU, CUDA)}
