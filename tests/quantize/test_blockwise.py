"""Codes and scales: nearest, of least squared error, and the same however the matrix is cut."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.quantize.blockwise import QuantizedRows, count_coarse_blocks, dequantize_rows, quantize_rows

FLOAT32 = np.dtype(np.float32)
FORMATS = [
    BlockFormat(bits, size, symmetric) for bits in (8, 4) for size in (32, 64, 128) for symmetric in (True, False)
]
ALL_FORMATS = pytest.mark.parametrize("format", FORMATS, ids=str)


def weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def decode(rows: QuantizedRows, format: BlockFormat) -> np.ndarray:
    """(code - zero_point) * scale in float64, element by element."""
    result = np.empty(rows.codes.shape)
    for (n, k), code in np.ndenumerate(rows.codes):
        block = k // format.block_size
        zero = 2 ** (format.bits - 1) if rows.zero_points is None else int(rows.zero_points[n, block])
        result[n, k] = (int(code) - zero) * float(rows.scales[n, block])
    return result


@ALL_FORMATS
@pytest.mark.parametrize("columns", [256, 200, 33, 1])
def test_dequantizing_is_code_less_zero_point_times_scale(format: BlockFormat, columns: int) -> None:
    weight = weights(3, columns)
    rows = quantize_rows(weight, format, FLOAT32)
    assert rows.codes.shape == weight.shape
    assert rows.codes.max() < 2**format.bits
    assert rows.scales.shape == (3, -(-columns // format.block_size))
    assert (rows.zero_points is None) == format.symmetric
    np.testing.assert_allclose(dequantize_rows(rows, format), decode(rows, format), rtol=1e-6)


@ALL_FORMATS
@pytest.mark.parametrize("scale_type", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_code_is_the_nearest_for_its_stored_scale(format: BlockFormat, scale_type: type) -> None:
    weight = weights(4, 200, seed=1)
    rows = quantize_rows(weight, format, np.dtype(scale_type))
    assert rows.scales.dtype == scale_type
    scale = np.repeat(rows.scales.astype(np.float64), format.block_size, 1)[:, :200, None]
    zeros = np.full(rows.scales.shape, 2 ** (format.bits - 1)) if rows.zero_points is None else rows.zero_points
    zero = np.repeat(zeros.astype(int), format.block_size, 1)[:, :200, None]
    distances = np.abs(weight[..., None] - (np.arange(2**format.bits) - zero) * scale)
    chosen = np.take_along_axis(distances, rows.codes[..., None].astype(int), -1)[..., 0]
    np.testing.assert_array_less(chosen, distances.min(-1) + 1e-6 * np.abs(scale[..., 0]))


def squared_error(weight: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """Of the nearest symmetric codes `[..., block]` for scales `[...]`, in float64."""
    half = 2 ** (bits - 1)
    steps = np.clip(np.rint(weight / scale[..., None]), -half, half - 1)
    return ((weight - steps * scale[..., None]) ** 2).sum(-1)


# With 8 bits the error of a scale depends on how each weight happens to round: luck that a grid of 4000 finds.
@pytest.mark.parametrize(("bits", "nearness"), [(4, 1.02), (8, 1.2)])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_symmetric_scales_come_near_the_least_squared_error(bits: int, nearness: float, size: int) -> None:
    weight = weights(64, size, seed=2)
    format = BlockFormat(bits, size, True)
    rows = quantize_rows(weight, format, FLOAT32)
    found = ((decode(rows, format) - weight) ** 2).sum()
    double, peak = weight.astype(np.float64), np.abs(weight).max(1).astype(np.float64)
    largest = 2 ** (bits - 1) - 1
    by_maximum = squared_error(double, peak / largest, bits).sum()
    grid = np.concatenate([np.linspace(0.6, 1.1, 2000), -np.linspace(0.6, 1.1, 2000)]) / largest
    least = np.min([squared_error(double, peak * step, bits) for step in grid], axis=0).sum()
    assert least <= found * (1 + 1e-6)
    assert found < nearness * least
    assert found < by_maximum


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_pay_where_a_block_lies_on_one_side_of_zero(bits: int) -> None:
    weight = np.abs(weights(32, 128, seed=3))
    errors = []
    for symmetric in (True, False):
        format = BlockFormat(bits, 64, symmetric)
        errors.append(((decode(quantize_rows(weight, format, FLOAT32), format) - weight) ** 2).sum())
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_block_far_from_zero_is_held_as_well_as_by_steps_from_zero(bits: int, sign: int) -> None:
    """Zero keeps a code, so the codes reach from it to the end of the block: each weight is within half a step."""
    format = BlockFormat(bits, 64, False)
    weight = (sign * np.random.default_rng(8).uniform(0.5, 1, (16, 128))).astype(np.float32)
    half = np.abs(weight.astype(np.float64)).max() / format.top / 2
    apart = decode(quantize_rows(weight, format, FLOAT32), format) - weight
    assert np.sqrt((apart**2).mean()) <= half


@ALL_FORMATS
def test_zeros_stay_exactly_zero(format: BlockFormat) -> None:
    weight = weights(6, 200, seed=4)
    weight[:, ::3] = 0
    weight[2] = 0
    restored = dequantize_rows(quantize_rows(weight, format, FLOAT32), format)
    assert (restored[weight == 0] == 0).all()


@ALL_FORMATS
@pytest.mark.parametrize("magnitude", [3e38, 1e30, 1e-30, 1e-35, 1e-37, 1e-44, 0.0])
def test_no_magnitude_overflows(format: BlockFormat, magnitude: float) -> None:
    weight = (np.sign(weights(3, 128, seed=5)) * np.float32(magnitude)).astype(np.float32)
    with np.errstate(all="raise", under="ignore"):
        restored = dequantize_rows(quantize_rows(weight, format, FLOAT32), format)
    assert np.isfinite(restored).all()
    # A block whose scale would be below the smallest normal number vanishes.
    np.testing.assert_allclose(restored, weight, rtol=0.1, atol=2**8 * np.finfo(np.float32).tiny)


@ALL_FORMATS
@pytest.mark.parametrize("steps", [0.01, 0.3, 3.0, 40.0])
def test_no_block_vanishes_in_float16_and_what_is_inexact_is_counted(format: BlockFormat, steps: float) -> None:
    info = np.finfo(np.float16)
    # Scales of 0.01 to 40 times the smallest number that the type has; the second row is zeros, the third is large.
    peak = np.float32(steps * float(info.smallest_subnormal)) * np.float32(2 ** (format.bits - 1))
    weight = np.sign(weights(3, 200, seed=7)) * peak
    weight[1], weight[2] = 0, weights(1, 200)
    rows = quantize_rows(weight, format, np.dtype(np.float16))
    assert (rows.scales[0] != 0).all()
    assert (rows.scales[1] == 0).all()
    inexact = np.abs(rows.scales[0].astype(np.float64)) < float(info.smallest_normal)
    assert inexact.all()
    assert count_coarse_blocks(weight, rows, format) == rows.scales.shape[1]
    # Off by no more than half a step, where the codes reach.
    step = float(info.smallest_subnormal)
    assert np.abs(decode(rows, format)[0] - weight[0]).max() <= 2 ** (format.bits - 1) * step


@pytest.mark.parametrize("scale_type", [np.float32, ml_dtypes.bfloat16])
def test_blocks_that_become_zero_are_counted(scale_type: type) -> None:
    format, weight = BlockFormat(4, 32, True), np.full((2, 64), 1e-38, dtype=np.float32)
    weight[1, :32] = 0
    rows = quantize_rows(weight, format, np.dtype(scale_type))
    assert (dequantize_rows(rows, format) == 0).all()
    assert count_coarse_blocks(weight, rows, format) == 3
    large = weights(2, 64)
    assert count_coarse_blocks(large, quantize_rows(large, format, np.dtype(scale_type)), format) == 0


@given(
    format=st.sampled_from(FORMATS),
    columns=st.integers(1, 300),
    cuts=st.lists(st.integers(0, 40), max_size=5),
    seed=st.integers(0, 99),
)
def test_rows_do_not_depend_on_how_the_matrix_is_cut(format: BlockFormat, columns: int, cuts: list, seed: int) -> None:
    weight = weights(40, columns, seed)
    whole = quantize_rows(weight, format, FLOAT32)
    edges = sorted({0, *cuts, 40})
    pieces = [quantize_rows(weight[a:b], format, FLOAT32) for a, b in itertools.pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate([piece.codes for piece in pieces]), whole.codes)
    np.testing.assert_array_equal(np.concatenate([piece.scales for piece in pieces]), whole.scales)
    if whole.zero_points is not None:
        np.testing.assert_array_equal(np.concatenate([piece.zero_points for piece in pieces]), whole.zero_points)


def test_a_large_matrix_equals_its_rows_one_by_one() -> None:
    format, weight = BlockFormat(4, 32, True), weights(70, 8192, seed=6)
    whole = quantize_rows(weight, format, FLOAT32)
    for n in (0, 15, 16, 69):
        row = quantize_rows(weight[n : n + 1], format, FLOAT32)
        np.testing.assert_array_equal(row.codes[0], whole.codes[n])
        np.testing.assert_array_equal(row.scales[0], whole.scales[n])
