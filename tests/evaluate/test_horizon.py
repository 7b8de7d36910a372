"""Half-lives and horizons against products counted one by one, and gamma's digits."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest

from retnet_tools.evaluate.lint import HeadMemory, gamma_text, head_memories
from tests.helpers import ABLATIONS, BASE


def tokens_until(gamma: Fraction, share: Fraction) -> int:
    """The first n with gamma^n <= share, in exact arithmetic."""
    left, n = Fraction(1), 0
    while left > share:
        left, n = left * gamma, n + 1
    return n


@pytest.mark.parametrize("head", range(4))
def test_half_life_and_horizon_are_where_exact_powers_of_gamma_cross(head: int) -> None:
    gamma = 1 - Fraction(1, 2 ** (5 + head))
    memory = head_memories(BASE)[head]
    assert memory.head == str(head)
    assert math.isclose(memory.gamma, gamma, rel_tol=1e-15)
    assert math.ceil(memory.half_life) == tokens_until(gamma, Fraction(1, 2))
    assert math.ceil(memory.horizon) == tokens_until(gamma, Fraction(1, 100))


def test_a_long_horizon_equals_its_series() -> None:
    # ln(1 - x) = -x - x^2 / 2 - ..., of which two terms are exact here
    x = 2.0**-36
    memory = HeadMemory("31", math.log1p(-x))
    assert math.isclose(memory.half_life, math.log(2) / (x + x * x / 2), rel_tol=1e-14)
    assert math.isclose(memory.horizon, math.log(100) / (x + x * x / 2), rel_tol=1e-14)


def test_gamma_of_one_never_forgets() -> None:
    (memory, *_) = head_memories(replace(BASE, decay=(0.0,) * 4))
    assert memory.gamma == 1
    assert memory.half_life == memory.horizon == math.inf


def test_the_slowest_and_the_fastest_pair_are_those_of_the_head() -> None:
    pairs = (-0.1, -0.2, -0.3, -0.4, -0.5, -0.6, 0.0, -0.7, -1.0, -2.0, -3.0, -4.0, -9.0, -8.0, -7.0, -6.0)
    memories = head_memories(replace(ABLATIONS["head_rotation"], decay=(-1.0,) * 4, key_decay=pairs))
    assert [(memory.head, memory.log_gamma) for memory in memories] == [
        *(("0, slowest pair", -1.1), ("0, fastest pair", -1.4)),
        *(("1, slowest pair", -1.0), ("1, fastest pair", -1.7)),
        *(("2, slowest pair", -2.0), ("2, fastest pair", -5.0)),
        *(("3, slowest pair", -7.0), ("3, fastest pair", -10.0)),
    ]


@pytest.mark.parametrize("exponent", [1, 5, 8, 12, 24, 36])
def test_printed_gamma_keeps_five_digits_of_what_is_lost(exponent: int) -> None:
    lost = Fraction(1, 2**exponent)
    printed = Fraction(gamma_text(math.log1p(-float(lost))))
    assert abs((1 - printed) / lost - 1) < Fraction(1, 10**4)


@pytest.mark.parametrize(("log_gamma", "text"), [(0.0, "1"), (math.log(0.25), "0.25"), (-30.0, "9.35762e-14")])
def test_gamma_far_from_one_is_printed_as_it_is(log_gamma: float, text: str) -> None:
    assert gamma_text(log_gamma) == text
