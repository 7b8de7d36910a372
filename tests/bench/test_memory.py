"""Peaks are those since the last reset, and memory of a GPU is asked of the CUDA runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retnet_tools.bench import memory, resident
from retnet_tools.bench.engines import RetNetEngine
from retnet_tools.bench.measurements import Measurements
from retnet_tools.bench.memory import device_free, device_name, device_used
from retnet_tools.bench.options import Case
from retnet_tools.bench.resident import anonymous_resident, peak_resident, reset_peak
from retnet_tools.bench.specs import RetNetSpec
from retnet_tools.runtime.cuda import CudaDevice, CudaRuntime
from retnet_tools.runtime.providers import Device
from tests.exports import export
from tests.helpers import BASE, random_source

SIZE = 200 << 20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel keeps no peak to reset")
def test_a_peak_is_seen_and_forgotten_after_a_reset() -> None:
    assert reset_peak()
    before = peak_resident()
    block = np.ones(SIZE, dtype=np.uint8)
    with_block = peak_resident()
    del block
    assert reset_peak()
    after = peak_resident()
    assert before is not None
    assert with_block is not None
    assert after is not None
    assert with_block - before > 0.9 * SIZE
    assert with_block - after > 0.9 * SIZE


def test_the_cpu_has_no_device_memory() -> None:
    assert (device_used(Device("cpu")), device_free(Device("cpu"))) == (None, None)


def test_device_memory_is_what_the_cuda_runtime_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runtime:
        def cudaSetDevice(self, index) -> int:
            return 0 if index.value == 1 else 101

        def cudaMemGetInfo(self, free, total) -> int:
            free._obj.value, total._obj.value = 30 << 30, 80 << 30
            return 0

        def cudaGetLastError(self) -> int:
            return 101

        class Text:
            def __call__(self, code) -> bytes:
                return b"invalid device ordinal"

        cudaGetErrorString = Text()

    monkeypatch.setattr(memory, "cuda_runtime", lambda index: CudaRuntime(index, 13, Runtime()))
    assert (device_used(Device("cuda", 1)), device_free(Device("cuda", 1))) == (50 << 30, 30 << 30)
    assert device_used(Device("cuda", 0)) is None


def test_a_gpu_is_named_by_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def devices(self) -> list[CudaDevice]:
            return [CudaDevice(i, f"GPU {7 + i}", (9, 0), 80 << 30, 132, 227 << 10) for i in range(2)]

    monkeypatch.setattr(memory, "CudaDriver", Driver)
    assert device_name(Device("cuda", 1)) == "GPU 8"
    assert device_name(Device("cuda", 2)) is None
    assert device_name(Device("cpu")) is None


def test_without_a_reset_there_is_no_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would include what loading took."""
    monkeypatch.setattr(resident, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    assert reset_peak() is False
    out = export(BASE, random_source(BASE, 1), tmp_path / "out")
    measured = Measurements(RetNetEngine, RetNetSpec(out, Device("cpu"), 1, 128))
    assert measured.run(Case("decode", 2, 0, 1)).peak_resident_bytes is None
    assert measured.run(Case("prefill", 9, 0, 1)).peak_resident_bytes is None


def test_anonymous_memory_is_that_of_no_file() -> None:
    before = anonymous_resident()
    if before is None:
        pytest.skip("the kernel does not say")
    block = np.ones(SIZE, dtype=np.uint8)
    after = anonymous_resident()
    assert after is not None
    assert 0.9 * SIZE < after - before < 1.1 * block.nbytes
