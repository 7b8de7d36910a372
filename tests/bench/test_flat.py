"""The slope of latency is that of the data, its interval holds as often as it says, and logits are compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retnet_tools.bench.flat import POSITIONS, _flatness, fit_slope, measure_flat
from retnet_tools.bench.models import Model, Precision
from retnet_tools.bench.options import BenchOptions
from retnet_tools.graph.export import plan_export, write_export
from retnet_tools.runtime.providers import Device
from tests.exports import checkpoint
from tests.helpers import BASE, random_source
from tests.tolerances import GRAPH_POSITIONS

X = np.log10(POSITIONS)


def test_an_exact_line_has_its_slope_and_no_interval() -> None:
    latencies = 0.25 * X + np.array([[10.0], [11.0], [40.0]])
    assert fit_slope(X, latencies) == (pytest.approx(0.25), pytest.approx(0, abs=1e-9))


def test_it_is_the_least_squares_solution() -> None:
    rng = np.random.default_rng(0)
    latencies = rng.normal(10, 1, (5, 4))
    design = np.zeros((20, 6))
    design[np.arange(20), np.repeat(np.arange(5), 4)] = 1
    design[:, 5] = np.tile(X, 5)
    solution, residual, *_ = np.linalg.lstsq(design, latencies.reshape(-1), rcond=None)
    slope, half = fit_slope(X, latencies)
    assert slope == pytest.approx(solution[5])
    error = np.sqrt(residual[0] / 14 * np.linalg.inv(design.T @ design)[5, 5])
    assert half == pytest.approx(2.1448 * error, rel=1e-3)  # Student's t for 14 degrees of freedom, from tables


def test_the_interval_holds_nineteen_times_of_twenty() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(2000):
        drift = np.cumsum(rng.normal(0, 5, (4, 1)), axis=0)
        slope, half = fit_slope(X, 20 + drift + 0.3 * X + rng.normal(0, 1, (4, 4)))
        inside += abs(slope - 0.3) < half
    assert 0.935 < inside / 2000 < 0.965


@pytest.mark.parametrize(("slope", "equal"), [(0.0, True), (0.5, False), (-0.5, False)])
def test_latencies_are_equal_where_the_interval_holds_no_change(slope: float, equal: bool) -> None:
    latencies = 20 + slope * X + np.random.default_rng(2).normal(0, 0.05, (5, 4))
    assert _flatness(latencies, np.ones((4, 7)), [None] * 4).equal is equal


def model(tmp_path: Path, shift: float = 0.0) -> Model:
    source = random_source(BASE, 1)
    plan = plan_export(checkpoint(BASE, source), dtype="float32", ops="fused")
    write_export(plan, tmp_path / "out", force=False, progress=lambda count: None)
    source.tensors["final_norm.weight"] = source.tensors["final_norm.weight"] + np.float32(shift)
    return Model("base", tmp_path / "out", BASE, Precision("float32", None, "fused"), "float32", source)


def test_logits_at_a_million_are_those_of_float64(tmp_path: Path) -> None:
    options = BenchOptions(tokens=(4,), repetitions=3, threads=(1,), flat=True)
    flat = measure_flat(model(tmp_path), options, Device("cpu"), lambda *_: None)
    assert [p.position for p in flat.positions] == [1_000, 10_000, 100_000, 1_000_000]
    for place in flat.positions:
        assert place.max_abs is not None
        assert place.max_abs < GRAPH_POSITIONS
        assert place.logits_scale > 1
        assert place.ms_per_token > 0
    assert flat.slope_low <= flat.slope <= flat.slope_high
    assert flat.difference == pytest.approx(3 * flat.slope)
    assert flat.equal == (flat.slope_low <= 0 <= flat.slope_high)
    widest = max(abs(flat.difference_low), abs(flat.difference_high))
    assert flat.largest_share == pytest.approx(widest / flat.positions[0].ms_per_token)


def test_other_weights_are_noticed(tmp_path: Path) -> None:
    options = BenchOptions(tokens=(2,), repetitions=3, threads=(1,), flat=True)
    flat = measure_flat(model(tmp_path, shift=0.01), options, Device("cpu"), lambda *_: None)
    assert all(p.max_abs is not None and p.max_abs > 10 * GRAPH_POSITIONS for p in flat.positions)
