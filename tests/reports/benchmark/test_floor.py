"""The device is measured: what it reads and multiplies in a second, and that a measurement can be trusted."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from retnet_tools.graph.probes import ProductShape
from retnet_tools.graph.quantization import Scheme
from retnet_tools.reports.benchmark import floor
from retnet_tools.reports.benchmark.floor import last_cache_bytes, product_rate, read_bandwidth
from retnet_tools.reports.benchmark.models import Precision, write_probes
from retnet_tools.runtime.providers import Device

CPU = Device("cpu")


def test_reading_is_at_least_as_fast_as_summing_up() -> None:
    buffer = np.ones(1 << 24, dtype=np.float32)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - began)
    measured = max(read_bandwidth(CPU, 1, Path(), quick=True) for _ in range(3))
    assert 0.7 * buffer.nbytes / min(seconds) < measured < 1e13


def test_every_way_reads_the_whole_buffer() -> None:
    part = np.ones(1 << 16, dtype=np.int32)
    largest, *compare = floor._ways()
    part[-1] = 9
    assert largest(part) == 9
    for way in compare:
        assert way(np.ones(1 << 16, dtype=np.int32)) == 0
        assert way(part) != 0


def test_buffers_are_larger_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(floor, "last_cache_bytes", lambda: 1 << 27)
    monkeypatch.setattr(floor, "_timed", lambda walk, pool, way, parts: sizes.append(sum(p.nbytes for p in parts)) or 1)
    read_bandwidth(CPU, 2, Path(), quick=False)
    assert min(sizes) == 4 << 27


@pytest.mark.parametrize("scheme", [None, Scheme("int8", 128), Scheme("int4", 32)])
def test_products_are_timed_in_the_types_of_the_model(scheme: Scheme | None, tmp_path: Path) -> None:
    shape = ProductShape(512, 256, "float32")
    folder = write_probes(shape, Precision("float32", scheme, "fused"), tmp_path / "probes")
    rate = product_rate(CPU, 1, folder, shape, quick=True)
    assert 1e8 < rate < 1e15


def test_the_copy_of_a_gpu_runs_on_a_cpu_too(tmp_path: Path) -> None:
    folder = write_probes(ProductShape(64, 64, "float32"), Precision("float32", None, "fused"), tmp_path / "probes")
    assert floor._copy_bandwidth(CPU, folder, (1 << 22,)) > 1e7


def test_the_cache_is_known_or_zero() -> None:
    assert last_cache_bytes() == 0 or 1 << 15 <= last_cache_bytes() < 1 << 34
