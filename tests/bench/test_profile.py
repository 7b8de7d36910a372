"""A profile is summed up by operator over the steps that count."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from retnet_tools.bench.models import Model, Precision
from retnet_tools.bench.options import BenchOptions
from retnet_tools.bench.profile import measure_profile, operator_times
from retnet_tools.bench.results import OperatorTime
from retnet_tools.graph.contract import STEP_FILE
from retnet_tools.runtime.providers import Device
from tests.exports import export
from tests.helpers import BASE, random_source


def event(name: str, start: int, duration: int, operator: str | None = None) -> dict[str, object]:
    kind = "Session" if operator is None else "Node"
    return {"cat": kind, "name": name, "ts": start, "dur": duration, "args": {"op_name": operator} if operator else {}}


def test_warm_up_does_not_count_and_times_are_of_a_step() -> None:
    events = []
    for step in range(4):
        start = 1000 * step
        events += [
            event("model_run", start, 9000 if step == 0 else 800),
            event("a_kernel_time", start + 10, 5000 if step == 0 else 300, "Gemm"),
            event("b_kernel_time", start + 400, 200, "Gemm"),
            event("c_fence_before", start + 5, 7, "Mul"),
            event("c_kernel_time", start + 700, 100, "Mul"),
        ]
    assert operator_times(events, skip=1) == (
        pytest.approx(0.8),
        (
            OperatorTime("Gemm", 2.0, pytest.approx(0.5), pytest.approx(5 / 8)),
            OperatorTime("Mul", 1.0, pytest.approx(0.1), pytest.approx(1 / 8)),
        ),
    )


def test_time_inside_a_subgraph_counts_once() -> None:
    events = [
        event("model_run", 0, 100),
        event("model_run", 1000, 1000),
        event("g_kernel_time", 1010, 100, "Gemm"),
        # An If with a node and another If in it, which begins with its own node and has taken a microsecond less.
        event("h/then/a_kernel_time", 1210, 300, "LinearAttention"),
        event("h/then/i/then/b_kernel_time", 1520, 51, "Gemm"),
        event("h/then/i_kernel_time", 1520, 50, "If"),
        event("h_kernel_time", 1200, 400, "If"),
        event("k_kernel_time", 1600, 40, "Gemm"),
    ]
    ms, operators = operator_times(events, skip=1)
    found = {operator.operator: (operator.calls, round(1e3 * operator.ms)) for operator in operators}
    assert found == {"LinearAttention": (1, 300), "Gemm": (3, 191), "If": (2, 50)}
    assert ms == 1


def test_the_operators_are_those_of_the_graph_and_the_case_is_named(tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 1), tmp_path / "out")
    model = Model("base", folder, BASE, Precision("float32", None, "fused"), "float32", None)
    options = BenchOptions(threads=(1, 2), batches=(3, 1), depths=(7, 0))
    profile = measure_profile(model, options, Device("cpu"), tmp_path)
    assert (profile.test, profile.batch, profile.threads, profile.device) == ("tg16 @ d7", 3, 1, "cpu")
    found = {p.operator: p for p in profile.operators}
    # What a step of decoder.onnx runs is what step.onnx holds.
    assert found["Gemm"].calls == sum(node.op_type == "Gemm" for node in onnx.load(folder / STEP_FILE).graph.node)
    assert profile.outside_ms == pytest.approx(profile.ms - sum(p.ms for p in found.values()))
    assert sum(p.share for p in found.values()) + profile.outside_ms / profile.ms == pytest.approx(1)
    assert 0 < profile.outside_ms < profile.ms
