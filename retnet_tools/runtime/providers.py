"""Execution providers: what was asked for, what was got, and never something else in silence."""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retnet_tools.errors import InputError, ProviderError, UsageError

if TYPE_CHECKING:
    import onnxruntime

CUDA_LIBRARIES = ("libcuda.so.1", "libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcudnn.so.9")
"""What the CUDA provider of onnxruntime-gpu 1.27 and later loads, in the order in which a missing one is named."""


@dataclass(frozen=True)
class Device:
    """A device as named on the command line: `cpu` or `cuda[:n]`."""

    kind: str
    index: int = 0

    @property
    def provider(self) -> str:
        """ONNX Runtime's name for the provider of this device."""
        return {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[self.kind]


def parse_device(text: str) -> Device:
    """`cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"(cpu)|(cuda)(?::(\d+))?", text.strip().lower())
    if not match:
        raise UsageError(f"device {text!r}", "cpu, cuda or cuda:N")
    return Device("cpu") if match[1] else Device("cuda", int(match[3] or 0))


def open_session(
    path: Path, device: Device, threads: int | None = None, *, prepack: bool = True, profile: Path | None = None
) -> onnxruntime.InferenceSession:
    """Open a graph on a device, and on no other.

    Args:
        path: the graph; its external data lies beside it.
        device: where to run.
        threads: of the CPU provider; None lets ONNX Runtime choose.
        prepack: whether the CPU provider may keep rearranged copies of the weights; without, it maps their file.
        profile: the start of the name of a profile that ONNX Runtime writes when the session's profiling ends.

    Raises:
        ProviderError: the provider cannot be had, or has no kernel for the graph; says what is missing.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    provider: Any = device.provider
    check_device(device)
    if device.kind == "cuda":
        provider = (device.provider, {"device_id": device.index})
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:
        reason = " ".join(str(error).split())
        if "NOT_IMPLEMENTED" in reason:
            raise ProviderError(
                f"{path.name} cannot run on {device.kind} ({reason})",
                "a graph whose types the provider has kernels for",
                "the CPU provider has none for bfloat16: export with --dtype fp32 or fp16",
            ) from error
        if device.kind == "cuda":
            raise ProviderError(f"{path} cannot be opened on cuda:{device.index} ({reason})") from error
        raise InputError(
            f"{path} cannot be opened ({reason})", "a complete export", "export the checkpoint again"
        ) from error
    if session.get_providers()[0] != device.provider:
        raise ProviderError(
            f"{device.provider} did not start; ONNX Runtime offers {', '.join(session.get_providers())}",
            device.provider,
            "check the driver and the CUDA libraries, or use --device cpu",
        )
    return session


def check_device(device: Device) -> None:
    """Check that a device's provider can be had, as far as can be told without opening a graph.

    Raises:
        ProviderError: what is missing.
    """
    if device.kind == "cpu":
        return
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise ProviderError(
            "this onnxruntime has no CUDA provider",
            "the package onnxruntime-gpu",
            "pip uninstall onnxruntime, then pip install --force-reinstall onnxruntime-gpu, or use --device cpu",
        )
    # It prints what it cannot load to stdout, which is for results.
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()
    if missing := missing_libraries():
        raise ProviderError(
            f"the CUDA provider cannot load {', '.join(missing)}",
            "an NVIDIA driver, CUDA 13 and cuDNN 9",
            "install what is missing (pip install 'onnxruntime-gpu[cuda,cudnn]' brings all but the driver), "
            "or use --device cpu",
        )


def missing_libraries() -> list[str]:
    """The CUDA libraries that cannot be loaded on this machine."""
    missing = []
    for name in CUDA_LIBRARIES:
        try:
            ctypes.CDLL(name)
        except OSError:
            missing.append(name)
    return missing
