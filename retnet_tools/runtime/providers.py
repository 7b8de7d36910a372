"""Execution providers: what was asked for, what was got, and never something else in silence."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retnet_tools.console import LOG
from retnet_tools.errors import InputError, ProviderError, UsageError
from retnet_tools.graph.contract import STEP_FILE
from retnet_tools.graph.cuda_kernels import cpu_nodes
from retnet_tools.graph.cuda_retention import step_kernel, tokens_kernel
from retnet_tools.graph.manifest import Manifest
from retnet_tools.graph.reader import load_graph
from retnet_tools.runtime import cuda, installation
from retnet_tools.runtime.placement import RECORD_PLACEMENT, Placement, node_placement

if TYPE_CHECKING:
    import onnxruntime

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class CpuFallbackWarning(UserWarning):
    """Something runs on the CPU that was asked for on CUDA, as `Device.cpu_fallback` allows."""


@dataclass(frozen=True)
class Device:
    """A device as named on the command line: `cpu` or `cuda[:n]`.

    Attributes:
        cpu_fallback: whether what cannot run there may run on the CPU; `CpuFallbackWarning` says so then.
    """

    kind: str
    index: int = 0
    cpu_fallback: bool = False

    @property
    def provider(self) -> str:
        """ONNX Runtime's name for the provider of this device."""
        return _PROVIDERS[self.kind]

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


def parse_device(text: str, *, cpu_fallback: bool = False) -> Device:
    """`cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"(cpu)|(cuda)(?::(\d{1,4}))?", text.strip().lower())
    if not match:
        raise UsageError(f"device {text!r}", "cpu, cuda or cuda:N")
    return Device("cpu") if match[1] else Device("cuda", int(match[3] or 0), cpu_fallback)


def open_session(
    path: Path,
    device: Device,
    threads: int | None = None,
    *,
    prepack: bool = True,
    cuda_graph: bool = False,
    profile: Path | None = None,
    weights: Mapping[str, onnxruntime.OrtValue] | None = None,
) -> onnxruntime.InferenceSession:
    """Open a graph on a device, and on no other.

    float32 is float32: products do not use TF32. Device memory grows by what is asked for, not by powers of two.

    Args:
        path: the graph; its external data lies beside it.
        device: where to run. step.onnx runs there whole; of other graphs only what computes shapes may run on the CPU.
        threads: of the CPU provider; None lets ONNX Runtime choose.
        prepack: whether the CPU provider may keep rearranged copies of the weights; without, it maps their file.
        cuda_graph: whether CUDA captures the graph on the first run of each `gpu_graph_id`, and replays it then.
        profile: the start of the name of a profile that ONNX Runtime writes when the session's profiling ends.
        weights: values to use for tensors of the external data, by name, in place of loading them.

    Raises:
        ProviderError: the provider cannot be had, has no kernel for the graph, or no memory; says what is missing.
    """
    import onnxruntime

    # What goes wrong is an error of ours; its own lines would come beside it.
    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry(*RECORD_PLACEMENT)
    if threads is not None:
        options.intra_op_num_threads = threads
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    for name, value in (weights or {}).items():
        options.add_initializer(name, value)
    check_device(device)
    provider: Any = device.provider
    if device.kind == "cuda":
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        provider = (provider, _cuda_options(device, cuda_graph=cuda_graph))
    try:
        # ONNX Runtime's own fallback opens the graph on the CPU and says so on stdout.
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider], enable_fallback=0)
    except Exception as error:
        raise _cannot_open(path, device, " ".join(str(error).split())) from error
    if session.get_providers()[0] != device.provider:
        raise ProviderError(
            f"{device.provider} did not start; ONNX Runtime offers {', '.join(session.get_providers())}",
            device.provider,
            "check the driver and the CUDA libraries with `retnet-tools doctor`, or use --device cpu",
        )
    if device.kind == "cuda":
        _check_placement(path, device, node_placement(session))
    LOG.debug("opened %s on %s", path, device)
    return session


def check_device(device: Device) -> None:
    """Check that a device's provider can be had, as far as can be told without opening a graph.

    Raises:
        ProviderError: what is missing.
    """
    if device.kind == "cpu":
        return
    check_provider_package()
    if missing := missing_libraries():
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
    return Device("cpu")


def check_provider_package() -> None:
    """Check that the onnxruntime in use has a CUDA provider.

    Raises:
        ProviderError: it has none; says which packages lie over each other where they do.
    """
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return
    packages = installation.packages_in_use()
    clash = installation.package_clash(packages)
    raise ProviderError(
        f"this onnxruntime has no CUDA provider{f': {clash}' if clash else ''}",
        "the package onnxruntime-gpu" + (" alone" if clash else ""),
        f"{installation.repair(packages)}, or use --device cpu",
    )


def check_retention(manifest: Manifest, device: Device) -> None:
    """Check that the retention of an export runs on a device: LinearAttention on CUDA refuses some shapes.

    Raises:
        ProviderError: it does not.
    """
    if device.kind == "cpu" or manifest.ops == "standard" or manifest.device == "cuda":
        return
    check_device(device)
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


def missing_libraries() -> list[str]:
    """The libraries of the CUDA provider that cannot be loaded on this machine."""
    return [name for name, path in cuda_libraries().items() if path is None]


def cuda_libraries() -> dict[str, str | None]:
    """Load the libraries of the CUDA provider: where each was found, None for one that is missing."""
    import onnxruntime

    # It prints what it cannot load to stdout, which is for results.
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()
    return cuda.find_libraries(cuda.library_names(cuda.cuda_major()), cuda.library_folders())


def placement_refusal(path: Path, placement: Placement) -> Counter[str]:
    """Operators of a graph on CUDA that run on the CPU and may not, with their numbers."""
    allowed: set[str] = set()
    if path.name != STEP_FILE:
        allowed = {node.name for node in cpu_nodes(load_graph(path)) if node.reason == "shapes"}
    return placement.on_cpu(allowed)


def _check_placement(path: Path, device: Device, placement: Placement) -> None:
    refused = placement_refusal(path, placement)
    if not refused:
        return
    names = ", ".join(f"{operator} ({count})" for operator, count in sorted(refused.items()))
    found = f"{sum(refused.values())} nodes of {path.name} have no place on {device}: {names}"
    if not device.cpu_fallback:
        raise ProviderError(found, "every node on the device", "export with --device cuda, or add --allow-cpu-fallback")
    warnings.warn(f"{found}; they run on the CPU, as --allow-cpu-fallback says", CpuFallbackWarning, stacklevel=3)


def _cuda_options(device: Device, *, cuda_graph: bool) -> dict[str, str]:
    return {
        "device_id": str(device.index),
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": str(int(cuda_graph)),
    }


def _cannot_open(path: Path, device: Device, reason: str) -> Exception:
    """The error for a graph that ONNX Runtime does not open."""
    if "NOT_IMPLEMENTED" in reason or "IsNodeCompatibleWithProvider" in reason:
        action = "the CPU provider has none for bfloat16: export with --dtype fp32 or fp16"
        if device.kind == "cuda":
            action = "export with --device cuda, or with --dtype fp32"
        return ProviderError(
            f"{path.name} cannot run on {device} ({reason})", "a graph whose types the provider has kernels for", action
        )
    if device.kind == "cuda":
        if is_out_of_memory(reason):
            return ProviderError(f"{path.name} does not fit into the memory of {device} ({reason})", "", SMALLER)
        return ProviderError(f"{path} cannot be opened on {device} ({reason})")
    return InputError(f"{path} cannot be opened ({reason})", "a complete export", "export the checkpoint again")


SMALLER = "a smaller batch, --dtype fp16, --quantize int8 or int4, another device, or --device cpu"
"""What to do where the memory of a device does not suffice."""

_OUT_OF_MEMORY = (
    "out of memory",
    r"[Ff]ailed to allocate memory",
    "Available memory of [0-9]+ is smaller",
    "cudaErrorMemoryAllocation",
    r"CUDA failure 2\b",
    "CUBLAS_STATUS_ALLOC_FAILED",
    r"CUDNN_STATUS_\w*ALLOC\w*",
)


def is_out_of_memory(reason: str) -> bool:
    """Whether an error of ONNX Runtime, CUDA or its libraries says that a device has no memory left."""
    return bool(re.search("|".join(_OUT_OF_MEMORY), reason))
