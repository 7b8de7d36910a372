"""Implementations take turns; one that fails or does not fit is left out and said so, RetNet's failure is an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retnet_tools.errors import RetNetToolsError
from retnet_tools.graph.probes import ProductShape
from retnet_tools.reports.benchmark import rounds
from retnet_tools.reports.benchmark.implementations import Implementation
from retnet_tools.reports.benchmark.measurements import Sample
from retnet_tools.reports.benchmark.options import Case
from retnet_tools.reports.benchmark.results import Subject
from retnet_tools.reports.benchmark.rounds import Round, Setting
from tests.reports.benchmark.reports import TRAFFIC

TESTS = [Case("decode", 4, 0, 1), Case("decode", 4, 0, 8)]
SETTING = Setting(3, Path("probes"), ProductShape(8, 8, "float32"), quick=True)


def implementation(name: str) -> Implementation:
    subject = Subject(name, "cpu", "float32", None, "fused", TRAFFIC)
    return Implementation(subject, lambda threads: name, ("prefill", "decode"), 2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Processes that answer at once; what they were asked, in order."""
    asked: list[tuple[str, ...]] = []

    class Answering:
        fails: Callable[[str, Case], bool] = staticmethod(lambda name, test: False)

        def __init__(self, name: str, spec: object) -> None:
            if "cannot open" in name:
                raise RetNetToolsError("no such kernel")
            self.name = name

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            asked.append((self.name, "closed"))

        def call(self, method: str, *arguments: Any) -> Any:
            if method != "run":
                return {"bandwidth": 1e10, "product_rate": 1e11, "device_free": None}[method]
            test = arguments[0]
            asked.append((self.name, test.name, test.batch))
            if self.name == "failing" and test.batch == 8:
                raise RetNetToolsError("it broke")
            return Sample((0.01,) * 4, 1, None)

    monkeypatch.setattr(rounds, "Worker", Answering)
    return asked


def run(*names: str) -> Round:
    round = Round([implementation(name) for name in names], TESTS, 1, SETTING)
    round.run(lambda *_: None, 0, 6)
    return round


def test_implementations_take_turns_and_change_who_goes_first(calls: list[tuple[str, ...]]) -> None:
    rows = list(run("retnet", "torch").rows())
    assert [(name, batch) for name, _, batch in calls[:-2]] == [
        *(("retnet", 1), ("torch", 1), ("retnet", 8), ("torch", 8)),
        *(("torch", 1), ("retnet", 1), ("torch", 8), ("retnet", 8)),
        *(("retnet", 1), ("torch", 1), ("retnet", 8), ("torch", 8)),
    ]
    assert [call[1] for call in calls[-2:]] == ["closed", "closed"]
    assert [(row.implementation, row.batch, row.retnet_speedup) for row in rows] == [
        *(("retnet", 1, None), ("torch", 1, 1.0), ("retnet", 8, None), ("torch", 8, 1.0)),
    ]


def test_an_alternative_that_fails_is_left_out_from_then_on(calls: list[tuple[str, ...]]) -> None:
    round = run("retnet", "failing")
    assert [(s.implementation, s.batch, s.reason) for s in round.skipped] == [("failing", 8, "it broke")]
    assert [(row.implementation, row.batch) for row in round.rows()] == [("retnet", 1), ("failing", 1), ("retnet", 8)]
    assert sum(call[0] == "failing" and call[-1] == 8 for call in calls) == 1


def test_an_alternative_that_cannot_be_opened_is_left_out(calls: list[tuple[str, ...]]) -> None:
    round = run("retnet", "cannot open")
    assert [s.reason for s in round.skipped] == ["no such kernel"] * 2
    assert {row.implementation for row in round.rows()} == {"retnet"}


def test_retnet_must_run(calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "RETNET", "failing")
    with pytest.raises(RetNetToolsError, match="it broke"):
        run("failing")


def test_what_does_not_fit_into_memory_is_not_tried(
    calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "available_memory", lambda: rounds.MEMORY_MARGIN + 2 * 4 * TRAFFIC.fixed_state)
    round = run("retnet", "torch")
    assert {(s.implementation, s.batch) for s in round.skipped} == {("retnet", 8), ("torch", 8)}
    assert all("GB are free" in s.reason for s in round.skipped)
    assert {call[-1] for call in calls} == {1, "closed"}
