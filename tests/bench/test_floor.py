"""The device is measured: what it reads and multiplies in a second, and that a measurement can be trusted."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from retnet_tools.bench import floor
from retnet_tools.bench.floor import (
    Copier,
    Probes,
    ProbeSpec,
    Products,
    ProductShape,
    Reader,
    last_cache_bytes,
    read_sizes,
)
from retnet_tools.bench.models import Precision, write_probes
from retnet_tools.graph.quantization import Scheme
from retnet_tools.runtime.buffers import buffer_of
from retnet_tools.runtime.providers import Device

CPU = Device("cpu")


def test_reading_is_at_least_as_fast_as_summing_up() -> None:
    buffer = np.ones(1 << 24, dtype=np.float32)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - began)
    reader = Reader((1 << 26,), 1)
    measured = max(reader.bandwidth() for _ in range(3))
    assert 0.7 * buffer.nbytes / min(seconds) < measured < 1e13


def test_every_way_reads_the_whole_buffer() -> None:
    part = np.ones(1 << 16, dtype=np.int32)
    largest, *compare = floor._ways()
    part[-1] = 9
    assert largest(part) == 9
    for way in compare:
        assert way(np.ones(1 << 16, dtype=np.int32)) == 0
        assert way(part) != 0


def test_each_part_is_read_by_the_thread_that_filled_it(monkeypatch: pytest.MonkeyPatch) -> None:
    filled: dict[int, int] = {}
    read: list[tuple[int, int, int]] = []

    def fill(length: int) -> np.ndarray:
        part = np.ones(length, dtype=np.int32)
        filled[part.ctypes.data] = threading.get_ident()
        return part

    def way(part: np.ndarray) -> None:
        read.append((filled[part.ctypes.data], threading.get_ident(), part.nbytes))

    monkeypatch.setattr(floor, "_filled", fill)
    monkeypatch.setattr(floor, "_ways", lambda: [way])
    Reader((1 << 16, 1 << 18), 2).bandwidth()
    assert len(set(filled.values())) == 2
    assert all(owner == reader for owner, reader, _ in read)
    assert {size for *_, size in read} == {1 << 15, 1 << 17}


@pytest.mark.parametrize(
    ("quick", "free", "expected"),
    [
        (False, None, {4 << 27, 1 << 29}),
        (True, None, {4 << 27}),
        (True, 1 << 30, {1 << 28}),
        (True, 1 << 20, {1 << 26}),
    ],
)
def test_buffers_are_larger_than_the_cache_where_memory_allows(
    quick: bool, free: int | None, expected: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floor, "last_cache_bytes", lambda: 1 << 27)
    monkeypatch.setattr(floor, "available_memory", lambda: free)
    assert set(read_sizes(quick=quick)) == expected


def test_caches_of_all_usable_cores_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cache(core: int, index: int, level: int, shared: str, size: str) -> None:
        folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, text in (("level", level), ("shared_cpu_list", shared), ("size", size)):
            (folder / name).write_text(f"{text}\n")

    for core in range(6):
        cache(core, 0, 1, str(core), "48K")
        cache(core, 3, 3, "0-1" if core < 2 else "2-3" if core < 4 else "4-5", "32M")
    monkeypatch.setattr(floor, "_CACHES", tmp_path)
    for cores, expected in (({0}, 32), ({0, 1}, 32), ({1, 2, 3}, 64), (set(range(6)), 96), ({9}, 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores, raising=False)
        assert last_cache_bytes() == expected << 20


@pytest.mark.parametrize("scheme", [None, Scheme("int8", 128), Scheme("int4", 32), Scheme("int4", 32, exclude=("w",))])
def test_products_are_timed_in_the_types_of_the_model(scheme: Scheme | None, tmp_path: Path) -> None:
    shape = ProductShape(512, 256, "float32")
    folder = write_probes(shape, Precision("float32", scheme, "fused"), tmp_path / "probes")
    assert 1e8 < Products(CPU, 1, folder, shape, (128,)).rate() < 1e15
    # Rules name RetNet's matrices: the probe has the type of most of them.
    bits = folder.joinpath("weights.data").stat().st_size * 8 / (512 * 256)
    assert bits == pytest.approx({None: 32, "int8": 8.25, "int4": 5}[scheme and scheme.type], rel=0.02)


def test_the_copy_of_a_gpu_runs_on_a_cpu_too(tmp_path: Path) -> None:
    folder = write_probes(ProductShape(64, 64, "float32"), Precision("float32", None, "fused"), tmp_path / "probes")
    assert Copier(CPU, folder, 1 << 22).bandwidth() > 1e7


def test_runs_are_queued_and_waited_for_once() -> None:
    waits = []

    class Session:
        def io_binding(self) -> SimpleNamespace:
            return SimpleNamespace(bind_input=print, bind_output=print)

        def run_with_iobinding(self, binding: object, options: onnxruntime.RunOptions) -> None:
            waits.append(options.get_run_config_entry("disable_synchronize_execution_providers"))

    class Waiting(onnxruntime.RunOptions):
        def get_run_config_entry(self, name: str) -> str:
            return ""

    buffers = [buffer_of(np.zeros(1, dtype=np.float32), CPU) for _ in range(2)]
    queue = floor._Queue(Session(), *buffers, 4)  # type: ignore[arg-type]
    queue._options[-1] = Waiting()
    assert queue.seconds() > 0
    assert waits == ["1", "1", "1", ""]


def test_sessions_and_buffers_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ProductShape(64, 64, "float32")
    folder = write_probes(shape, Precision("float32", None, "fused"), tmp_path / "probes")
    opened = []
    monkeypatch.setattr(floor, "open_session", lambda *a, _open=floor.open_session: opened.append(a) or _open(*a))
    monkeypatch.setattr(floor, "read_sizes", lambda quick: (1 << 20,))
    made = []
    monkeypatch.setattr(floor, "_filled", lambda n, _fill=floor._filled: made.append(n) or _fill(n))
    probes = Probes(ProbeSpec(CPU, 1, folder, shape, quick=True))
    for _ in range(3):
        assert probes.bandwidth() > 1e7
        assert probes.product_rate() > 1e6
    assert (len(opened), len(made)) == (1, 1)


def test_the_cache_is_known_or_zero() -> None:
    assert last_cache_bytes() == 0 or 1 << 15 <= last_cache_bytes() < 1 << 36
