"""The driver and the CUDA runtime through ctypes, against libraries that were compiled from C."""

from __future__ import annotations

import numpy as np
import pytest

from retnet_tools.errors import ProviderError
from retnet_tools.runtime.cuda import CudaDriver, CudaRuntime, find_libraries, library_names
from tests.fake_gpu import FakeGpu, needs_fake_gpu

DEVICES = """
import json
from dataclasses import asdict
from retnet_tools.runtime.cuda import CudaDriver
driver = CudaDriver()
print(json.dumps([driver.cuda_version, [asdict(device) for device in driver.devices()]]))
"""
MEMORY = """
import json, numpy
from retnet_tools.runtime.cuda import cuda_runtime
runtime = cuda_runtime(0)
before = runtime.memory()
array = numpy.arange(24, dtype="f4").reshape(4, 2, 3)
source, target = (runtime.allocate(size) for size in (96, 72))
runtime.upload(source, array)
runtime.copy_rows(target, source, 24, [3, 0, 3])

def read(address, *shape):
    found = numpy.empty(shape, dtype="f4")
    runtime.download(found, address)
    return found.tolist()

copied, kept = read(target, 3, 2, 3), read(source, 4, 2, 3)
runtime.clear(source, 96)
cleared, during = read(source, 4, 2, 3), runtime.memory()
runtime.release(source)
runtime.release(target)
print(json.dumps([before, during, runtime.memory(), copied, kept, cleared]))
"""


@needs_fake_gpu
def test_devices_are_described() -> None:
    version, devices = FakeGpu(devices=2, memory_bytes=3 << 30).evaluate(DEVICES)
    assert version == "13.0"
    assert devices == [
        {
            "index": index,
            "name": f"Fake GPU {index}",
            "capability": [9, 0],
            "memory_bytes": 3 << 30,
            "multiprocessors": 132,
            "shared_memory_bytes": 227 * 1024,
        }
        for index in range(2)
    ]


@needs_fake_gpu
def test_memory_is_filled_copied_by_rows_cleared_and_given_back() -> None:
    before, during, after, copied, kept, cleared = FakeGpu(memory_bytes=1 << 30).evaluate(MEMORY)
    rows = [[[6.0 * i + 3 * j + k for k in range(3)] for j in range(2)] for i in range(4)]
    assert copied == [rows[3], rows[0], rows[3]]
    assert kept == rows
    assert cleared == [[[0.0] * 3] * 2] * 4
    assert before == [1 << 30, 1 << 30]
    assert during == [(1 << 30) - 168, 1 << 30]
    assert after == before


class Library:
    """Every function fails with one error."""

    def __init__(self, code: int, text: bytes | None = b"what went wrong") -> None:
        self.code, self.text = code, text

    def __getattr__(self, name: str):
        return lambda *arguments: self.code

    def cuGetErrorString(self, code, place) -> int:
        if self.text is None:
            return 1
        place._obj.value = self.text
        return 0

    class Text:
        def __call__(self, code) -> bytes | None:
            return b"what went wrong"

    cudaGetErrorString = Text()


def test_a_driver_that_fails_says_why() -> None:
    with pytest.raises(ProviderError, match=r"the NVIDIA driver does not start \(what went wrong, 803\)"):
        CudaDriver(Library(803))
    with pytest.raises(ProviderError, match=r"does not start \(error, 999\)"):
        CudaDriver(Library(999, text=None))
    with pytest.raises(ProviderError, match="finds no device; expected a GPU, not hidden by CUDA_VISIBLE_DEVICES"):
        CudaDriver(Library(100))


def test_a_runtime_that_fails_says_what_failed() -> None:
    with pytest.raises(ProviderError, match=r"cudaSetDevice fails on cuda:2 \(what went wrong, 35\)") as caught:
        CudaRuntime(2, 13, Library(35)).memory()
    assert caught.value.exit_code == 4


def test_an_error_is_taken_back_before_onnxruntime_finds_it() -> None:
    """ONNX Runtime asks for the last error after each of its kernels."""
    calls = []

    class Full(Library):
        def __getattr__(self, name: str):
            calls.append(name)
            return lambda *arguments: 2 if name == "cudaMalloc" else 0

    with pytest.raises(ProviderError, match=r"cudaMalloc fails on cuda:0 \(what went wrong, 2\)"):
        CudaRuntime(0, 13, Full(2)).allocate(100)
    assert calls == ["cudaSetDevice", "cudaMalloc", "cudaGetLastError"]


def test_every_copy_is_done_when_its_method_returns() -> None:
    """A small upload returns before it has arrived, and ONNX Runtime's stream waits for none of the default one."""
    calls = []

    class Recorded(Library):
        def __getattr__(self, name: str):
            calls.append(name)
            return lambda *arguments: 0

    runtime, array = CudaRuntime(0, 13, Recorded(0)), np.zeros(4)
    for copy, last in (
        (lambda: runtime.upload(1 << 20, array), ["cudaMemcpy", "cudaStreamSynchronize"]),
        (lambda: runtime.download(array, 1 << 20), ["cudaMemcpy"]),
        (lambda: runtime.copy_rows(1 << 20, 1 << 21, 16, (1, 0)), ["cudaMemcpyAsync"] * 2 + ["cudaDeviceSynchronize"]),
        (lambda: runtime.clear(1 << 20, 32), ["cudaMemset", "cudaDeviceSynchronize"]),
    ):
        calls.clear()
        copy()
        assert [name for name in calls if name != "cudaSetDevice"] == last


def test_a_library_that_is_not_there_is_a_provider_error() -> None:
    with pytest.raises(ProviderError, match=r"libcudart\.so\.7 cannot be loaded.*expected CUDA 7"):
        CudaRuntime(0, 7)


def test_libraries_are_found_with_their_paths() -> None:
    found = find_libraries(["libc.so.6", "libnothing.so.1"])
    assert found["libnothing.so.1"] is None
    assert str(found["libc.so.6"]).endswith("/libc.so.6")


def test_names_follow_the_version_that_onnxruntime_was_built_for() -> None:
    names = library_names(12)
    assert names[0] == "libcuda.so.1"
    assert {"libcudart.so.12", "libcublas.so.12", "libcublasLt.so.12", "libcudnn.so.9"} <= set(names)
