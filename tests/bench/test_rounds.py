"""Implementations take turns in new processes; what fails or does not fit is left out and said so, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from retnet_tools.bench import rounds
from retnet_tools.bench.floor import ProbeSpec, ProductShape
from retnet_tools.bench.implementations import Implementation
from retnet_tools.bench.options import Case
from retnet_tools.bench.rounds import MEMORY_MARGIN, Round, Setting
from retnet_tools.bench.rows import Sample
from retnet_tools.bench.specs import TorchSpec
from retnet_tools.bench.worker import MemoryShortageError, WorkerError
from retnet_tools.errors import RetNetToolsError
from retnet_tools.runtime.providers import Device
from tests.bench.reports import TRAFFIC, subject
from tests.helpers import BASE

TESTS = [Case("decode", 4, 0, 1), Case("decode", 4, 0, 8)]
SETTING = Setting(3, Path("probes"), ProductShape(8, 8, "float32"), quick=True)


def implementation(name: str) -> Implementation:
    spec = lambda threads, kind: TorchSpec(BASE, "float32", threads)  # noqa: E731
    return Implementation(subject(name), spec, weights=lambda kind: 1000)


class Processes:
    """Processes that answer at once.

    Attributes:
        calls: what they were asked, in order.
        errors: what happens, by (implementation, batch, number of the run of that test); `closed` at a batch of 0.
        room: bytes that a test can have, by implementation.
        devices: where implementations run, where that is not the CPU.
        seconds: that a step takes, where that is not 0.01, as `errors`.
        limits: what the probes measure, in turns.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.errors: dict[tuple[str, int, int], RetNetToolsError] = {}
        self.room: dict[str, int] = {}
        self.devices: dict[str, Device] = {}
        self.seconds: dict[tuple[str, int, int], float] = {}
        self.limits = {"bandwidth": cycle([1e10]), "product_rate": cycle([1e11])}
        self.open: list[str] = []
        self.said: list[str] = []

    def worker(self) -> Callable[[str, object], Any]:
        processes = self

        class Worker:
            def __init__(self, name: str, spec: object) -> None:
                self.name, self.spec = name, spec

            def __enter__(self) -> Any:
                number = processes.calls.count((self.name, "opened"))
                processes.calls.append((self.name, "opened"))
                if (self.name, 0, number) in processes.errors:
                    raise processes.errors[self.name, 0, number]
                processes.open.append(self.name)
                return self

            def close(self) -> None:
                if self.name in processes.open:
                    processes.open.remove(self.name)
                    processes.calls.append((self.name, "closed"))

            def __exit__(self, *_: object) -> None:
                self.close()

            def call(self, method: str, *arguments: Any) -> Any:
                assert self.name in processes.open
                if isinstance(self.spec, ProbeSpec):
                    processes.calls.append((self.name, method))
                    return next(processes.limits[method])
                if method == "device":
                    return processes.devices.get(self.name, Device("cpu"))
                if method == "room":
                    return processes.room.get(self.name)
                (test,) = arguments
                key = (self.name, test.batch)
                number = processes.calls.count(key)
                processes.calls.append(key)
                if (*key, number) in processes.errors:
                    raise processes.errors[*key, number]
                return Sample((processes.seconds.get((*key, number), 0.01),) * 4, 1, None, "cpu", None)

        return Worker

    def runs(self) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if isinstance(call[1], int)]

    def run(self, *names: str, tests: Sequence[Case] = TESTS) -> Round:
        round = Round([implementation(name) for name in names], tests, 1, SETTING)
        round.run(lambda what, done, total: self.said.append(what), 0, 6)
        assert self.open == []
        return round


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    found = Processes()
    monkeypatch.setattr(rounds, "Worker", found.worker())
    monkeypatch.setattr(rounds, "available_memory", lambda: 10**9)
    return found


def test_implementations_take_turns_and_change_who_goes_first(processes: Processes) -> None:
    rows = list(processes.run("retnet", "torch").rows())
    assert processes.runs() == [
        *(("retnet", 1), ("torch", 1), ("retnet", 8), ("torch", 8)),
        *(("torch", 1), ("retnet", 1), ("torch", 8), ("retnet", 8)),
        *(("retnet", 1), ("torch", 1), ("retnet", 8), ("torch", 8)),
    ]
    assert [(row.implementation, row.batch, row.retnet_speedup) for row in rows] == [
        *(("retnet", 1, None), ("torch", 1, 1.0), ("retnet", 8, None), ("torch", 8, 1.0)),
    ]


def test_limits_are_measured_before_and_after_and_a_disturbed_product_is_none(processes: Processes) -> None:
    # Before and after, in three repetitions.
    processes.limits["bandwidth"] = cycle([1e10, 3e10])
    processes.limits["product_rate"] = cycle([1e11, 2e11, 4e11, 1e11, 3e11, 3e11])
    (row,) = processes.run("retnet", tests=[Case("prefill", 4, 0, 1)]).rows()
    assert row.bandwidths == (2e10, 2e10, 2e10)
    assert row.product_rates == (2e11, 4e11, 3e11)
    measured = [("the probes", "bandwidth"), ("the probes", "product_rate")]
    calls = [call for call in processes.calls if call in measured or call == ("retnet", 1)]
    assert calls == 3 * [*measured, ("retnet", 1), *measured]


def test_decoding_has_no_limit_by_products(processes: Processes) -> None:
    rows = list(processes.run("retnet").rows())
    assert [row.product_rates for row in rows] == [(), ()]
    assert ("the probes", "product_rate") not in processes.calls


def test_every_repetition_has_new_processes_that_are_open_together(processes: Processes) -> None:
    processes.run("retnet", "torch")
    calls = [call for call in processes.calls if "probes" not in call[0]]
    one = [("retnet", "opened"), ("torch", "opened"), ("retnet", "closed"), ("torch", "closed")]
    assert [call for call in calls if isinstance(call[1], str)] == 3 * one
    for name in ("retnet", "torch"):
        places = [i for i, call in enumerate(calls) if call == (name, "opened")]
        assert all(
            sum(c == (name, 8) for c in calls[a:b]) == 1 for a, b in zip(places, [*places[1:], None], strict=True)
        )
    assert processes.calls.count(("the probes", "opened")) == 1
    assert [text for text in processes.said if "loading" in text] == [
        f"repetition {n}: loading {name}" for n in (1, 2, 3) for name in ("retnet", "torch")
    ]


def test_an_alternative_that_fails_is_left_out_from_then_on(processes: Processes) -> None:
    processes.errors["torch", 8, 0] = RetNetToolsError("it broke")
    round = processes.run("retnet", "torch")
    assert [(s.implementation, s.batch, s.reason, s.repetitions) for s in round.skipped] == [
        ("torch", 8, "it broke", 0)
    ]
    assert [(row.implementation, row.batch) for row in round.rows()] == [("retnet", 1), ("torch", 1), ("retnet", 8)]
    assert processes.runs().count(("torch", 8)) == 1


def test_a_test_that_fails_later_keeps_its_finished_repetitions(processes: Processes) -> None:
    processes.errors["torch", 8, 2] = RetNetToolsError("it broke")
    round = processes.run("retnet", "torch")
    assert [(s.batch, s.repetitions) for s in round.skipped] == [(8, 2)]
    rows = {(row.implementation, row.batch): row for row in round.rows()}
    assert len(rows["torch", 8].repetitions) == 2
    assert rows["torch", 8].retnet_speedup == 1
    assert len(rows["retnet", 8].repetitions) == 3


@pytest.mark.parametrize("name", ["retnet", "torch"])
@pytest.mark.parametrize("error", [WorkerError("it is gone"), MemoryShortageError("no memory")])
def test_a_test_that_memory_does_not_suffice_for_is_the_only_one_lost(
    error: RetNetToolsError, name: str, processes: Processes
) -> None:
    processes.errors[name, 1, 0] = error
    round = processes.run("retnet", "torch")
    assert [(s.implementation, s.batch, s.reason) for s in round.skipped] == [(name, 1, str(error))]
    # A new process in the same repetition.
    assert processes.calls.count((name, "opened")) == 4
    assert {(row.implementation, row.batch): len(row.repetitions) for row in round.rows()} == {
        (other, batch): 3 for other in ("retnet", "torch") for batch in (1, 8) if (other, batch) != (name, 1)
    }


def test_an_alternative_that_cannot_be_opened_is_left_out(processes: Processes) -> None:
    processes.errors["torch", 0, 0] = RetNetToolsError("no such kernel")
    round = processes.run("retnet", "torch")
    assert [s.reason for s in round.skipped] == ["no such kernel"] * 2
    assert {row.implementation for row in round.rows()} == {"retnet"}
    assert processes.calls.count(("torch", "opened")) == 1


def test_retnet_must_open_and_run(processes: Processes) -> None:
    processes.errors["retnet", 8, 0] = RetNetToolsError("it broke")
    with pytest.raises(RetNetToolsError, match="it broke"):
        processes.run("retnet", "torch")
    assert processes.open == []
    processes.errors = {("retnet", 0, processes.calls.count(("retnet", "opened"))): RetNetToolsError("no kernel")}
    with pytest.raises(RetNetToolsError, match="no kernel"):
        processes.run("retnet", "torch")
    assert processes.open == []


def test_what_does_not_fit_into_memory_is_not_tried_and_asked_once(processes: Processes) -> None:
    each = TRAFFIC.fixed_state + TRAFFIC.logit_bytes
    processes.room = {"retnet": MEMORY_MARGIN + 8 * each, "torch": MEMORY_MARGIN + 8 * each - 1}
    round = processes.run("retnet", "torch")
    assert [(s.implementation, s.batch) for s in round.skipped] == [("torch", 8)]
    assert "GB are free" in round.skipped[0].reason
    assert ("torch", 8) not in processes.runs()
    # What was judged to fit is not judged again when something else has taken the memory.
    processes.calls.clear()
    round = Round([implementation("retnet")], TESTS, 1, SETTING)
    progress = lambda what, done, total: processes.room.update(retnet=0) if "repetition 2" in what else None  # noqa: E731
    round.run(progress, 0, 6)
    assert round.skipped == []


def test_weights_that_do_not_fit_are_not_loaded(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "available_memory", lambda: 999)
    with pytest.raises(RetNetToolsError, match="the weights of retnet need"):
        processes.run("retnet")
    assert processes.calls == []


def test_an_alternative_on_another_device_is_not_compared(processes: Processes) -> None:
    processes.devices = {"torch": Device("cuda")}
    round = processes.run("retnet", "torch")
    assert {s.reason for s in round.skipped} == {"torch runs on cuda:0, and what it is measured against on cpu"}


def test_small_tests_come_first(processes: Processes) -> None:
    tests = [Case("decode", 4, 0, 8), Case("decode", 4, 100, 1), Case("decode", 4, 0, 1)]
    round = Round([implementation("retnet")], tests, 1, SETTING)
    round.run(lambda *_: None, 0, 9)
    assert processes.runs()[:3] == [("retnet", 1), ("retnet", 8), ("retnet", 1)]
    assert [(row.depth, row.batch) for row in round.rows()] == [(0, 8), (100, 1), (0, 1)]


def test_a_repetition_that_deviates_is_made_again_by_all(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.bench.test_rounds.SETTING", dataclasses.replace(SETTING, again=2))
    # The second run of torch at a batch of 8, and that of it which is made again, are slow.
    processes.seconds = {("torch", 8, 1): 0.02, ("torch", 8, 3): 0.012}
    rows = list(processes.run("retnet", "torch").rows())
    plain = [*(("retnet", 1), ("torch", 1), ("retnet", 8), ("torch", 8)), ("torch", 1), ("retnet", 1)]
    plain += [*(("torch", 8), ("retnet", 8)), *(("retnet", 1), ("torch", 1), ("retnet", 8), ("torch", 8))]
    assert processes.runs() == [*plain, *(("torch", 8), ("retnet", 8)) * 2]
    assert [(row.implementation, row.batch, row.made_again) for row in rows] == [
        *(("retnet", 1, ()), ("torch", 1, ()), ("retnet", 8, (1,)), ("torch", 8, (1,))),
    ]
    assert rows[-1].tokens_per_second_std == 0


def test_what_deviates_still_is_recorded_after_the_last_time(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.bench.test_rounds.SETTING", dataclasses.replace(SETTING, again=1))
    processes.seconds = {("retnet", 1, 0): 0.02, ("retnet", 1, 3): 0.0112}
    (row, _) = processes.run("retnet").rows()
    assert row.made_again == (0,)
    assert row.ms_medians == pytest.approx((11.2, 10, 10))
