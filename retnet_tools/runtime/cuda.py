"""The NVIDIA driver and the CUDA runtime through ctypes: devices, memory, copies. Nothing else is needed for them.

Error numbers are those of CUresult and cudaError_t, which agree where both are used here.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from retnet_tools.errors import ProviderError
from retnet_tools.runtime.failures import OutOfMemoryError
from retnet_tools.weights import Array

_WINDOWS = sys.platform == "win32"
_NO_MEMORY, _NO_DEVICE = 2, 100
_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3
# CUdevice_attribute
_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _MULTIPROCESSORS, _SHARED_MEMORY = 75, 76, 16, 97


@dataclass(frozen=True)
class CudaDevice:
    """A GPU as the driver describes it.

    Attributes:
        index: N of `cuda:N`.
        capability: compute capability, major and minor.
        memory_bytes: in all.
        shared_memory_bytes: that one block of threads can have at most.
    """

    index: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    multiprocessors: int
    shared_memory_bytes: int


def library_names(cuda_major: int) -> tuple[str, ...]:
    """What the CUDA provider loads, the driver first: its own dependencies, and cuDNN, which its reductions need."""
    if _WINDOWS:
        cuda = (f"{name}64_{cuda_major}.dll" for name in ("cudart", "cublasLt", "cublas"))
        return ("nvcuda.dll", *cuda, "curand64_10.dll", "cudnn64_9.dll")
    cuda = (f"lib{name}.so.{cuda_major}" for name in ("cudart", "cublasLt", "cublas"))
    return ("libcuda.so.1", *cuda, "libcurand.so.10", "libcudnn.so.9")


def find_libraries(names: Iterable[str], folders: Sequence[Path] = ()) -> dict[str, str | None]:
    """Load each library, the default way or from the first of the folders that has it: where it was found.

    That is None for one that cannot be loaded, and its name where no path is known.
    """
    found: dict[str, str | None] = {}
    for name in names:
        places = [name, *(str(folder / name) for folder in folders if (folder / name).is_file())]
        loaded = next((place for place in places if _loads(place)), None)
        found[name] = None if loaded is None else _mapped(name) or loaded
    return found


def library_folders() -> list[Path]:
    """Where libraries lie that the loader does not know of: the toolkit that CUDA_PATH or CUDA_HOME names, and what pip
    installed.

    NVIDIA's packages share the namespace `nvidia`, wherever on the path each of them is: nvidia/cudnn/lib,
    nvidia/cu13/lib and, on Windows, nvidia/cu13/bin/x86_64. onnxruntime looks for them beside itself only.
    """
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec and spec.submodule_search_locations) or ()]
    patterns = ("*/bin", "*/bin/x86_64") if _WINDOWS else ("*/lib",)
    found = (folder for root in roots for pattern in patterns for folder in sorted(root.glob(pattern)))
    toolkits = (Path(path) for name in ("CUDA_PATH", "CUDA_HOME") if (path := os.environ.get(name)))
    return [*(toolkit / ("bin" if _WINDOWS else "lib64") for toolkit in toolkits), *found]


def cuda_libraries() -> dict[str, str | None]:
    """Load the libraries of the CUDA provider: where each was found, None for one that is missing."""
    import onnxruntime

    # It prints what it cannot load to stdout, which is for results.
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()
    return find_libraries(library_names(cuda_major()), library_folders())


def _loads(place: str) -> bool:
    try:
        # A library that is loaded later finds it by its name, wherever it came from.
        ctypes.CDLL(place)
    except OSError:
        return False
    return True


def _mapped(name: str) -> str | None:
    """The file that is mapped into this process for a library."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[5] for line in lines if line.count(" ") >= 5 and "/" in line)
    return next((path for path in paths if Path(path).name.startswith(name)), None)


class CudaDriver:
    """libcuda: which devices there are. A `ProviderError` where there is no driver, or it does not start."""

    def __init__(self, library: Any = None) -> None:
        self._library = library or _load("nvcuda.dll" if _WINDOWS else "libcuda.so.1", "an NVIDIA driver")
        self._check(self._library.cuInit(0), "the NVIDIA driver does not start")

    @property
    def cuda_version(self) -> str:
        """The newest CUDA that the driver can run."""
        number = ctypes.c_int()
        self._check(self._library.cuDriverGetVersion(ctypes.byref(number)), "the driver does not say its version")
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def devices(self) -> list[CudaDevice]:
        """The devices that CUDA_VISIBLE_DEVICES leaves."""
        count = ctypes.c_int()
        self._check(self._library.cuDeviceGetCount(ctypes.byref(count)), "the driver does not count its devices")
        return [self._device(index) for index in range(count.value)]

    def _device(self, index: int) -> CudaDevice:
        handle, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        what = f"the driver does not describe cuda:{index}"
        self._check(self._library.cuDeviceGet(ctypes.byref(handle), ctypes.c_int(index)), what)
        self._check(self._library.cuDeviceGetName(name, ctypes.c_int(len(name)), handle), what)
        self._check(self._library.cuDeviceTotalMem_v2(ctypes.byref(memory), handle), what)
        major, minor, multiprocessors, shared = (
            self._attribute(number, handle, what)
            for number in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _MULTIPROCESSORS, _SHARED_MEMORY)
        )
        return CudaDevice(index, name.value.decode(), (major, minor), memory.value, multiprocessors, shared)

    def _attribute(self, number: int, handle: ctypes.c_int, what: str) -> int:
        value = ctypes.c_int()
        self._check(self._library.cuDeviceGetAttribute(ctypes.byref(value), ctypes.c_int(number), handle), what)
        return value.value

    def _check(self, code: int, what: str) -> None:
        if code == _NO_DEVICE:
            raise ProviderError("the NVIDIA driver finds no device", "a GPU, not hidden by CUDA_VISIBLE_DEVICES")
        if code:
            text = ctypes.c_char_p()
            known = self._library.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text)) == 0 and text.value
            raise ProviderError(f"{what} ({text.value.decode() if known and text.value else 'error'}, {code})")


class CudaRuntime:
    """libcudart: memory of a device, and copies to, from and within it. Addresses are plain numbers, sizes bytes.

    Every copy is done when its method returns. They run on the default stream, which ONNX Runtime's own does not wait
    for.

    Every call that fails is a `ProviderError`, an `OutOfMemoryError` where that is why.

    Args:
        index: N of `cuda:N`.
        cuda_major: of the CUDA that onnxruntime was built for.
    """

    def __init__(self, index: int, cuda_major: int, library: Any = None) -> None:
        name = f"cudart64_{cuda_major}.dll" if _WINDOWS else f"libcudart.so.{cuda_major}"
        self._library = library or _load(name, f"CUDA {cuda_major}")
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        self._index = ctypes.c_int(index)

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all. Starts CUDA on the device, which takes some memory of its own first."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, size: int) -> int:
        """The address of new memory, its content undefined."""
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return address.value or 0

    def release(self, address: int) -> None:
        """Give memory of `allocate` back. Nothing is raised: after an error of a kernel every call fails."""
        self._library.cudaFree(ctypes.c_void_p(address))

    def upload(self, address: int, array: Array) -> None:
        """Copy a C-contiguous array to the device."""
        self._copy(address, array.ctypes.data, array.nbytes, _HOST_TO_DEVICE)
        # A small copy returns once the array has been read, before it has arrived.
        self._call("cudaStreamSynchronize", None)

    def download(self, array: Array, address: int) -> None:
        """Fill a C-contiguous array from the device."""
        self._copy(array.ctypes.data, address, array.nbytes, _DEVICE_TO_HOST)

    def copy_rows(self, target: int, source: int, row_bytes: int, rows: Iterable[int]) -> None:
        """target[i] = source[rows[i]] for rows of so many bytes."""
        self._checked("cudaSetDevice", self._index)
        for place, row in enumerate(rows):
            self._checked(
                "cudaMemcpyAsync",
                ctypes.c_void_p(target + place * row_bytes),
                ctypes.c_void_p(source + row * row_bytes),
                ctypes.c_size_t(row_bytes),
                ctypes.c_int(_DEVICE_TO_DEVICE),
                None,
            )
        self._call("cudaDeviceSynchronize")

    def clear(self, address: int, size: int) -> None:
        """Set every byte to 0."""
        self._call("cudaMemset", ctypes.c_void_p(address), ctypes.c_int(0), ctypes.c_size_t(size))
        self._call("cudaDeviceSynchronize")

    def _copy(self, target: int, source: int, size: int, direction: int) -> None:
        places = ctypes.c_void_p(target), ctypes.c_void_p(source)
        self._call("cudaMemcpy", *places, ctypes.c_size_t(size), ctypes.c_int(direction))

    def _call(self, name: str, *arguments: Any) -> None:
        """A call on this device, whichever one was in use before."""
        self._checked("cudaSetDevice", self._index)
        self._checked(name, *arguments)

    def _checked(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._library, name)(*arguments):
            text = self._library.cudaGetErrorString(ctypes.c_int(code))
            # Else ONNX Runtime would find this error after a kernel of its own.
            self._library.cudaGetLastError()
            kind = OutOfMemoryError if code == _NO_MEMORY else ProviderError
            raise kind(f"{name} fails on cuda:{self._index.value} ({(text or b'error').decode()}, {code})")


@cache
def cuda_runtime(index: int) -> CudaRuntime:
    """The CUDA runtime of a device, of the version that onnxruntime was built for."""
    return CudaRuntime(index, cuda_major())


def cuda_major() -> int:
    """Of the CUDA version that onnxruntime was built for; 13 where it does not say."""
    import onnxruntime

    text = str(getattr(onnxruntime, "cuda_version", "") or "").split(".")[0]
    return int(text) if text.isdecimal() else 13


def _load(name: str, expected: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise ProviderError(f"{name} cannot be loaded ({error})", expected) from error
