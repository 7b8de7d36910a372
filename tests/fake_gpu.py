"""A GPU that computes nothing (`fake_cuda/fake_cuda.c`), for all that onnxruntime's CUDA provider does but numbers:
opening sessions, placing nodes, memory, bindings, capturing and replaying graphs.

Programs run in a process of their own, which loads the fake libraries in place of CUDA's.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import onnxruntime
import pytest

SOURCE = Path(__file__).parent / "fake_cuda" / "fake_cuda.c"
ROOT = Path(__file__).parent.parent
LIBRARIES = {
    "libcudart.so.13": "CUDART",
    "libcuda.so.1": "DRIVER",
    "libcublas.so.13": "CUBLAS",
    "libcublasLt.so.13": "CUBLASLT",
    "libcurand.so.10": "CURAND",
    "libcudnn.so.9": "CUDNN",
}
GENAI_LIBRARIES = {"libcufft.so.12": "CUFFT"}
"""What onnxruntime-genai's part for CUDA loads besides."""
UNVERSIONED = {"libcuda.so.1", "libcudnn.so.9"}


def why_not() -> str | None:
    """Why the fake GPU cannot be had here."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "needs Linux on x86-64"
    if shutil.which("cc") is None:
        return "needs a C compiler"
    if importlib.util.find_spec("nvidia") is not None:
        return "CUDA's own libraries are installed, and onnxruntime loads them first"
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers() or onnxruntime.cuda_version[:3] != "13.":
        return "needs onnxruntime-gpu for CUDA 13"
    return None


needs_fake_gpu = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@cache
def libraries() -> Path:
    """A folder with the fake libraries, compiled."""
    folder = Path(mkdtemp(prefix="fake-cuda-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, part in (LIBRARIES | GENAI_LIBRARIES).items():
        versions = folder / "versions.map"
        versions.write_text(f"{name} {{ global: *; }};\n")
        script = [] if name in UNVERSIONED else [f"-Wl,--version-script={versions}"]
        command = ["cc", "-w", "-O1", "-shared", "-fPIC", f"-D{part}", SOURCE, f"-Wl,-soname,{name}", *script]
        subprocess.run([*command, "-o", folder / name], check=True)
    return folder


@dataclass(frozen=True)
class FakeGpu:
    """The settings of a fake machine.

    Attributes:
        missing: libraries that it lacks.
    """

    devices: int = 1
    memory_bytes: int = 1 << 30
    missing: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, program: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run Python code, or a command line of `retnet-tools` given as `-m retnet_tools.cli.app`."""
        folder = libraries()
        if self.missing:
            folder = Path(mkdtemp(prefix="fake-cuda-", dir=folder))
            for name in (LIBRARIES | GENAI_LIBRARIES).keys() - set(self.missing):
                (folder / name).symlink_to(libraries() / name)
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(folder),
            "PYTHONPATH": str(ROOT),
            "FAKE_CUDA_DEVICES": str(self.devices),
            "FAKE_CUDA_MEMORY": str(self.memory_bytes),
            **self.environment,
        }
        command = [sys.executable, *(("-c", program) if not program.startswith("-m ") else program.split())]
        result = subprocess.run(
            [*command, *map(str, arguments)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
        )
        if check:
            assert result.returncode == 0, result.stderr
        return result

    def evaluate(self, program: str, *arguments: object) -> Any:
        """The JSON that a program prints in its last line."""
        return json.loads(self.run(program, *arguments).stdout.splitlines()[-1])


COUNTS = """
import ctypes
def counts():
    runtime = ctypes.CDLL("libcudart.so.13")
    return [ctypes.c_long.in_dll(runtime, name).value for name in ("launches", "captures", "replays")]
"""
"""Code for `FakeGpu.run`: kernels launched, graphs captured, graphs replayed so far."""
