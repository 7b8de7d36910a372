"""What a measuring process runs, and what it counts as its own memory on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from retnet_tools.bench import measurements
from retnet_tools.bench.measurements import Measurements
from retnet_tools.bench.options import WARM_UP_STEPS, Case
from retnet_tools.runtime.providers import Device

CUDA = Device("cuda")


class Gpu:
    """A GPU with 1000 bytes."""

    def __init__(self) -> None:
        self.used = 0


class Engine:
    """Takes 100 bytes, and 10 for each sequence while it holds them, of which it keeps the most it ever had."""

    vocab_size = 61

    def __init__(self, gpu: Gpu, at_once: int | None = None, device: Device = CUDA, keeps: int = 0) -> None:
        self.gpu, self.prompt_at_once, self.device, self.captured = gpu, at_once, device, True
        self.keeps, self.pool, self.held = keeps, 0, 0
        self.fed: list[tuple[int, ...]] = []
        self.placed: list[tuple[int, int, int]] = []
        gpu.used += 100

    def place(self, batch: int, depth: int, room: int) -> None:
        self.placed.append((batch, depth, room))
        self.held = 10 * batch
        grown = max(0, self.held - self.pool)
        self.pool += grown
        self.gpu.used += grown

    def feed(self, input_ids: np.ndarray) -> np.ndarray:
        self.fed.append(input_ids.shape)
        if input_ids.shape[0] == 13:
            raise MemoryError("no")
        return np.zeros((len(input_ids), 61))

    def release(self) -> None:
        back = self.pool - min(self.pool, self.keeps)
        self.pool -= back
        self.gpu.used -= back


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    monkeypatch.setattr(measurements, "check_device", lambda device: None)
    monkeypatch.setattr(measurements, "device_used", lambda device: found.used if device.kind == "cuda" else None)
    monkeypatch.setattr(measurements, "device_free", lambda device: 1000 - found.used)
    return found


def opened(gpu: Gpu, **settings: object) -> tuple[Measurements, Engine]:
    made: list[Engine] = []

    def make(spec: object) -> Engine:
        made.append(Engine(gpu, **settings))
        return made[0]

    return Measurements(make, SimpleNamespace(device=CUDA)), made[0]


def test_memory_of_a_test_is_what_the_process_holds_then_and_no_more(gpu: Gpu) -> None:
    first, _ = opened(gpu)
    second, _ = opened(gpu)
    for _ in range(3):
        assert first.run(Case("decode", 1, 0, 8)).device_bytes == 180
        # What others take in between, and what a larger test had, does not count.
        gpu.used += 50
        assert second.run(Case("decode", 1, 0, 2)).device_bytes == 120
        assert first.run(Case("decode", 1, 0, 1)).device_bytes == 110


def test_memory_that_the_process_keeps_is_its_own_and_there_for_the_next_test(gpu: Gpu) -> None:
    process, _ = opened(gpu, keeps=60)
    assert process.room() == 900
    assert process.run(Case("decode", 1, 0, 6)).device_bytes == 160
    assert gpu.used == 160
    assert process.room() == 900
    assert process.run(Case("decode", 1, 0, 1)).device_bytes == 160
    gpu.used += 500
    assert process.room() == 400


def test_memory_is_given_back_where_a_test_fails(gpu: Gpu) -> None:
    process, _ = opened(gpu)
    with pytest.raises(MemoryError):
        process.run(Case("decode", 1, 0, 13))
    assert gpu.used == 100
    assert process.run(Case("decode", 1, 0, 1)).device_bytes == 110


def test_where_it_runs_is_where_the_implementation_does(gpu: Gpu) -> None:
    fallen, _ = opened(gpu, device=Device("cpu"))
    sample = fallen.run(Case("decode", 1, 0, 1))
    assert (fallen.device().kind, sample.device, sample.device_bytes) == ("cpu", "cpu", None)
    process, _ = opened(gpu)
    sample = process.run(Case("decode", 1, 0, 1))
    assert (sample.device, sample.cuda_graph) == ("cuda", True)
    assert process.run(Case("prefill", 4, 0, 1)).cuda_graph is None


@pytest.mark.parametrize(
    ("at_once", "tokens", "warm_up"),
    [(None, 500, 500), (None, 7, 7), (128, 500, 128 + 116), (128, 256, 128), (128, 100, 100)],
)
def test_a_prompt_is_warmed_up_in_the_shapes_that_it_will_have(
    at_once: int | None, tokens: int, warm_up: int, gpu: Gpu
) -> None:
    process, engine = opened(gpu, at_once=at_once)
    process.run(Case("prefill", tokens, 9, 2))
    assert engine.fed == [(2, warm_up), (2, tokens)]
    room = 9 + tokens + WARM_UP_STEPS
    assert engine.placed == [(2, 9, room)] * 2
