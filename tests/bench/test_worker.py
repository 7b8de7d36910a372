"""A measuring process answers, passes errors on as they are, and is gone when it is told to or killed."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from retnet_tools.bench.floor import ProbeSpec, ProductShape
from retnet_tools.bench.measurements import Measurements
from retnet_tools.bench.models import Precision, write_probes
from retnet_tools.bench.options import Case
from retnet_tools.bench.specs import RetNetSpec, TorchSpec
from retnet_tools.bench.worker import MemoryShortageError, Worker, WorkerError, _attempt
from retnet_tools.errors import InputError, RetNetToolsError
from retnet_tools.runtime import cuda
from retnet_tools.runtime.device_memory import enough_memory
from retnet_tools.runtime.providers import Device
from retnet_tools.runtime.session import DecoderSession
from tests.exports import export
from tests.helpers import BASE, random_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(BASE, random_source(BASE, 1), tmp_path_factory.mktemp("worker") / "out")


def spec(folder: Path) -> RetNetSpec:
    return RetNetSpec(folder, Device("cpu"), 1, 128)


def test_steps_and_prompts_are_timed_in_a_process_of_its_own(folder: Path) -> None:
    with Worker("retnet", spec(folder)) as worker:
        steps = worker.call("run", Case("decode", 7, 0, 2))
        prompt = worker.call("run", Case("prefill", 40, 16, 2))
    assert len(steps.seconds) == 7
    assert len(prompt.seconds) == 1
    assert all(0 < seconds < 60 for seconds in (*steps.seconds, *prompt.seconds))
    assert steps.peak_resident_bytes is None or 1 << 24 < steps.peak_resident_bytes < 1 << 34
    assert steps.device_bytes is None


def test_logits_at_positions_are_those_of_the_session(folder: Path) -> None:
    from retnet_tools.random_weights import noise
    from retnet_tools.runtime.recurrent_state import RecurrentState

    positions, ids = np.array([5, 70_000]), np.array([3, 60])
    with Worker("retnet", spec(folder)) as worker:
        logits = worker.call("logits_at", positions, ids)
    session = DecoderSession(folder, threads=1)
    states = [noise((2, 4, 8, 12), start=7919 * i) for i in range(2)]
    np.testing.assert_array_equal(logits, session.step(ids, RecurrentState(states, positions, Device("cpu"))))


def test_what_opening_raises_reaches_the_caller(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder") as error, Worker("retnet", spec(tmp_path / "missing")):
        pass
    assert error.value.exit_code == 5


def test_the_unexpected_becomes_one_line(folder: Path) -> None:
    with Worker("retnet", spec(folder)) as worker:
        with pytest.raises(RetNetToolsError, match="unexpected AttributeError while measuring"):
            worker.call("no_such_method")
        assert len(worker.call("run", Case("decode", 2, 0, 1)).seconds) == 2


def test_a_killed_process_is_named_with_its_likely_cause(folder: Path) -> None:
    with Worker("transformer", spec(folder)) as worker:
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"runs transformer ended with signal SIGKILL; .* out of memory"):
            worker.call("run", Case("decode", 2, 0, 1))


def test_leaving_ends_the_process(folder: Path) -> None:
    with Worker("retnet", spec(folder)) as worker:
        process = worker._process
        assert process.poll() is None
    assert process.poll() is not None


def test_torch_is_measured_too() -> None:
    with Worker("torch", TorchSpec(BASE, "float32", 1)) as worker:
        assert len(worker.call("run", Case("decode", 3, 100, 2)).seconds) == 3


class OutOfMemory:
    """An engine whose device has no memory left."""

    device, vocab_size, captured, prompt_at_once = Device("cpu"), 61, None, None

    def __init__(self, spec: object) -> None: ...

    def place(self, batch: int, depth: int, room: int) -> None:
        if batch == 1:
            raise MemoryError
        if batch == 2:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 99")
        if batch == 3:
            with enough_memory(Device("cuda"), "a chunk", 10**9):
                raise RuntimeError("CUDA failure 2: out of memory")
        raise RuntimeError("something else")

    def release(self) -> None: ...


@pytest.mark.parametrize(
    ("batch", "message"), [(1, "not enough"), (2, "Failed to allocate"), (3, "a chunk needs about")]
)
def test_no_memory_is_an_error_of_its_own(batch: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "cuda_runtime", lambda index: SimpleNamespace(memory=lambda: (1, 2)))
    process = Measurements(OutOfMemory, SimpleNamespace(device=Device("cpu")))
    succeeded, error = _attempt(process.run, Case("decode", 1, 0, batch))
    assert not succeeded
    assert isinstance(error, MemoryShortageError)
    assert message in str(error)
    assert error.exit_code == (4 if batch == 3 else 1)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.exit_code) == (str(error), error.exit_code)
    _, other = _attempt(process.run, Case("decode", 1, 0, 9))
    assert not isinstance(other, MemoryShortageError)


def test_the_device_is_measured_in_a_process_of_its_own(folder: Path, tmp_path: Path) -> None:
    """So that what its buffers take is not counted to an implementation."""
    shape = ProductShape(64, 64, "float32")
    probes = write_probes(shape, Precision("float32", None, "fused"), tmp_path / "probes")
    with Worker("probes", ProbeSpec(Device("cpu"), 1, probes, shape, quick=True)) as worker:
        assert worker.call("bandwidth") > 1e8
        assert worker.call("product_rate") > 1e6
    assert not hasattr(Measurements, "bandwidth")


def test_nothing_is_kept_of_models_that_are_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RETNET_TOOLS_CACHE", str(tmp_path))
    monkeypatch.setattr("retnet_tools.bench.worker.subprocess.Popen", refused := Refused())
    with pytest.raises(StopIteration):
        Worker("retnet", spec(folder))
    assert refused.environment["RETNET_TOOLS_CACHE"] == "off"


class Refused:
    """A process that does not start."""

    environment: dict[str, str]

    def __call__(self, *_: object, env: dict[str, str], **__: object) -> None:
        self.environment = env
        raise StopIteration
