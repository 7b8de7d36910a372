"""Position tables against exact arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from retnet_tools.graph.contract import MAX_POSITION
from retnet_tools.graph.positions import decay_sum_tables, phase_tables
from tests.helpers import ABLATIONS, BASE

POSITIONS = [0, 1, 4095, 4096, 10_000, 999_999, MAX_POSITION]


@pytest.mark.parametrize("name", ["base", "head_rotation"])
@pytest.mark.parametrize("position", POSITIONS)
def test_phases_are_exact_at_any_position(position: int, name: str) -> None:
    config = ABLATIONS[name]
    tables = phase_tables(config)
    a, b = divmod(position, 4096)
    low = tables["positions.cos_low"][b] + 1j * tables["positions.sin_low"][b]
    high = tables["positions.cos_high"][a] + 1j * tables["positions.sin_high"][a]
    phase = [
        math.fmod(float(Fraction(theta) * position % Fraction(2 * math.pi)), 2 * math.pi)
        for theta in config.rotary_frequencies
    ]
    # 2 pi itself is a float64, so reducing by it costs position * 2^-53 at most.
    np.testing.assert_allclose(low * high, np.exp(1j * np.array(phase)), rtol=0, atol=3e-7 + position * 1e-15)


@pytest.mark.parametrize("decay", [BASE.decay, (0.0,) * 4, (-1e-9, -1e-5, -0.5, -30.0)])
@pytest.mark.parametrize("position", POSITIONS)
def test_decay_sums_are_exact_at_any_position(position: int, decay: tuple[float, ...]) -> None:
    tables = decay_sum_tables(replace(BASE, decay=decay))
    a, b = divmod(position, 4096)
    got = (
        tables["positions.decay_sum_low"][b]
        + tables["positions.decay_power_low"][b] * tables["positions.decay_sum_high"][a]
    )
    expected = [float(np.exp(np.arange(position, -1, -1, dtype=np.float64) * g).sum()) for g in decay]
    np.testing.assert_allclose(got, expected, rtol=5e-7)
