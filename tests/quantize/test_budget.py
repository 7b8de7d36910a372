"""Budgets: never passed, filled by what saves most, near the best choice of all."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retnet_tools.errors import UsageError
from retnet_tools.graph.quantization import BlockFormat
from retnet_tools.quantize.budget import Budget, Choice, fill_budget, matrix_bytes
from retnet_tools.quantize.packing import pack
from tests.quantize.test_blockwise import FLOAT32, FORMATS, quantize_rows, weights


def matrices(count: int, seed: int) -> list[list[Choice]]:
    draw = random.Random(seed)
    choices = []
    for _ in range(count):
        weight, cost = draw.randint(10, 100), 10 ** draw.uniform(-4, -1)
        choices.append(
            [Choice("int4", 5 * weight, cost), Choice("int8", 9 * weight, cost / 250), Choice(None, 32 * weight, 0.0)]
        )
    return choices


@given(count=st.integers(1, 6), seed=st.integers(0, 200), part=st.floats(0, 1))
def test_the_budget_is_kept_and_what_fits_is_used(count: int, seed: int, part: float) -> None:
    choices = matrices(count, seed)
    least = sum(options[0].size for options in choices)
    most = sum(options[-1].size for options in choices)
    size = int(least + part * (most - least))
    chosen = fill_budget(choices, size)
    used = sum(choice.size for choice in chosen)
    assert used <= size
    for choice, options in zip(chosen, choices, strict=True):
        assert choice in options
        # Nothing better fits any more.
        assert all(
            size - used < option.size - choice.size for option in options if option.divergence < choice.divergence
        )


def test_choices_come_near_the_best_of_all() -> None:
    lost = []
    for seed in range(60):
        choices = matrices(6, seed)
        sizes = [sum(options[k].size for options in choices) for k in (0, 1)]
        size = (sizes[0] + sizes[1]) // 2
        best = min(
            sum(choice.divergence for choice in combination)
            for combination in itertools.product(*choices)
            if sum(choice.size for choice in combination) <= size
        )
        lost.append(sum(choice.divergence for choice in fill_budget(choices, size)) / best)
    assert sorted(lost)[len(lost) // 2] < 1.05
    assert max(lost) < 3


def test_what_saves_nothing_is_not_bought() -> None:
    worse = [Choice("int4", 10, 1e-3), Choice("int8", 20, 2e-3), Choice(None, 80, 0.0)]
    assert fill_budget([worse], 50) == [worse[0]]
    assert fill_budget([worse], 80) == [worse[2]]


@pytest.mark.parametrize("divergence", [math.nan, math.inf])
def test_a_divergence_that_is_no_number_is_no_choice(divergence: float) -> None:
    with pytest.raises(ValueError, match="a divergence of"):
        Choice("int4", 10, divergence)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(5, 256), (3, 200), (1, 33)])
def test_bytes_of_a_matrix_are_those_that_are_packed(format: BlockFormat, shape: tuple[int, int]) -> None:
    parts = pack(quantize_rows(weights(*shape), format, FLOAT32), format, "rows")
    assert matrix_bytes(shape, format, 4) == sum(part.nbytes for part in parts if part is not None)
    assert matrix_bytes(shape, None, 2) == 2 * math.prod(shape)


@pytest.mark.parametrize("bits", [0.0, -1.0, math.inf, math.nan])
def test_bits_out_of_range_are_refused(bits: float) -> None:
    with pytest.raises(UsageError, match=r"--target-bits .*; expected a positive number"):
        Budget(bits=bits)


def test_size_and_bits_together_are_refused() -> None:
    with pytest.raises(UsageError, match="--target-size and --target-bits together; expected one of them"):
        Budget(size=10, bits=5.0)
