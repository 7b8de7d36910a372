"""GPTQ on matrices, against the paper's updates written out: H^-1 taken apart column by column, no Cholesky factor."""

from __future__ import annotations

import numpy as np
import pytest

from retnet_tools.errors import InputError
from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.quantize.blockwise import QuantizedRows, quantize_rows
from retnet_tools.quantize.gptq import DAMPING, ErrorFeedback, InputStatistics
from tests.quantize.test_blockwise import FLOAT32, decode, weights

FORMATS = [BlockFormat(4, 32, True), BlockFormat(4, 64, False), BlockFormat(8, 32, True), BlockFormat(8, 128, False)]
ALL_FORMATS = pytest.mark.parametrize("format", FORMATS, ids=str)


def inputs(columns: int, tokens: int = 400, seed: int = 0) -> np.ndarray:
    """Correlated inputs of very different sizes, as activations are, `[tokens, K]`."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, columns)) @ rng.standard_normal((columns, columns)) / np.sqrt(columns)
    return (mixed * np.exp(rng.standard_normal(columns))).astype(np.float32)


def statistics(x: np.ndarray, quantized: np.ndarray | None = None) -> InputStatistics:
    result = InputStatistics(x.shape[1])
    for part in np.array_split(np.arange(len(x)), 3):
        result.add(x[part], (x if quantized is None else quantized)[part])
    return result


def paper(target: np.ndarray, hessian: np.ndarray, rows: QuantizedRows, format: BlockFormat) -> np.ndarray:
    """Codes `[N, K]` of Eq. 2 and 3: round column q, spread its error by H^-1, remove q from H^-1; scales as given."""
    left, inverse = target.astype(np.float64), np.linalg.inv(hessian)
    codes = np.zeros(target.shape, dtype=np.uint8)
    middle = 2.0 ** (format.bits - 1)
    for q in np.argsort(-np.diagonal(hessian), kind="stable"):
        block = q // format.block_size
        scale = rows.scales[:, block].astype(np.float64)
        zero = middle if rows.zero_points is None else rows.zero_points[:, block].astype(float)
        codes[:, q] = np.clip(np.round(left[:, q] / scale) + zero, 0, 2**format.bits - 1)
        error = (left[:, q] - (codes[:, q] - zero) * scale) / inverse[q, q]
        left -= np.outer(error, inverse[q])
        inverse -= np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return codes


def damped(hessian: np.ndarray) -> np.ndarray:
    return hessian + DAMPING * np.diagonal(hessian).mean() * np.eye(len(hessian))


def objective(weight: np.ndarray, x: np.ndarray, rows: QuantizedRows, quantized: np.ndarray, format) -> float:
    """|W X - Q X'|^2 in float64."""
    apart = weight.astype(np.float64) @ x.T.astype(np.float64) - decode(rows, format) @ quantized.T.astype(np.float64)
    return float((apart**2).sum())


@ALL_FORMATS
@pytest.mark.parametrize("columns", [32, 96, 200, 300, 33, 1])
def test_codes_are_those_of_the_papers_updates(format: BlockFormat, columns: int) -> None:
    weight, x = weights(7, columns), inputs(columns)
    found = ErrorFeedback(statistics(x), "x").quantize(weight, format, FLOAT32)
    nearest = quantize_rows(weight, format, FLOAT32)
    np.testing.assert_array_equal(found.scales, nearest.scales)
    np.testing.assert_array_equal(found.codes, paper(weight, damped(statistics(x).hessian), nearest, format))
    assert columns == 1 or (found.codes != nearest.codes).any()


@pytest.mark.parametrize("scale_type", ["float16", "float32"])
def test_codes_are_chosen_for_scales_as_they_are_stored(scale_type: str) -> None:
    format, weight, x = BlockFormat(4, 32, True), weights(5, 96), inputs(96)
    found = ErrorFeedback(statistics(x), "x").quantize(weight, format, np.dtype(scale_type))
    assert found.scales.dtype == scale_type
    np.testing.assert_array_equal(found.codes, paper(weight, damped(statistics(x).hessian), found, format))


@ALL_FORMATS
@pytest.mark.parametrize("columns", [256, 200])
def test_outputs_are_nearer_than_to_nearest(format: BlockFormat, columns: int) -> None:
    weight, (x, unseen) = weights(16, columns), np.split(inputs(columns, tokens=4000), 2)
    nearest = quantize_rows(weight, format, FLOAT32)
    found = ErrorFeedback(statistics(x), "x").quantize(weight, format, FLOAT32)
    for tokens in (x, unseen):
        assert objective(weight, tokens, found, tokens, format) < 0.7 * objective(
            weight, tokens, nearest, tokens, format
        )


def test_inputs_that_differ_are_made_up_for() -> None:
    format, weight, x = BlockFormat(4, 32, True), weights(16, 128), inputs(128)
    noise = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    quantized = x + 0.2 * x.std(0) * noise
    matched = ErrorFeedback(statistics(x, quantized), "x").quantize(weight, format, FLOAT32)
    same = ErrorFeedback(statistics(quantized), "x").quantize(weight, format, FLOAT32)
    assert objective(weight, x, matched, quantized, format) < 0.8 * objective(weight, x, same, quantized, format)


def test_the_target_minimises_the_distance_of_the_outputs() -> None:
    weight, x = weights(3, 20).astype(np.float64), inputs(20).astype(np.float64)
    quantized = x + 0.1 * np.random.default_rng(1).standard_normal(x.shape)
    stats = InputStatistics(20)
    stats.add(x, quantized)
    expected = np.linalg.lstsq(quantized, x @ weight.T, rcond=None)[0].T
    np.testing.assert_allclose(ErrorFeedback(stats, "x", damping=0.0).target(weight), expected, rtol=1e-8)


@ALL_FORMATS
def test_columns_without_input_are_rounded_to_nearest(format: BlockFormat) -> None:
    weight, x = weights(6, 96), inputs(96)
    x[:, [0, 40, 95]] = 0
    found = ErrorFeedback(statistics(x), "x").quantize(weight, format, FLOAT32)
    nearest = quantize_rows(weight, format, FLOAT32)
    np.testing.assert_array_equal(found.codes[:, [0, 40, 95]], nearest.codes[:, [0, 40, 95]])


def test_no_input_at_all_is_round_to_nearest() -> None:
    format, weight = BlockFormat(4, 32, True), weights(6, 96)
    found = ErrorFeedback(statistics(np.zeros((9, 96), np.float32)), "x").quantize(weight, format, FLOAT32)
    np.testing.assert_array_equal(found.codes, quantize_rows(weight, format, FLOAT32).codes)


def test_fewer_tokens_than_columns_are_enough() -> None:
    format, weight, x = BlockFormat(4, 32, True), weights(16, 128), inputs(128, tokens=5)
    found = ErrorFeedback(statistics(x), "x").quantize(weight, format, FLOAT32)
    nearest = quantize_rows(weight, format, FLOAT32)
    assert objective(weight, x, found, x, format) < 0.1 * objective(weight, x, nearest, x, format)


def test_rows_do_not_depend_on_how_the_matrix_is_cut() -> None:
    format, weight, feedback = BlockFormat(4, 32, False), weights(9, 300), ErrorFeedback(statistics(inputs(300)), "x")
    whole = feedback.quantize(weight, format, FLOAT32)
    pieces = [feedback.quantize(part, format, FLOAT32) for part in np.split(weight, [1, 4])]
    np.testing.assert_array_equal(np.concatenate([piece.codes for piece in pieces]), whole.codes)


def test_the_statistics_are_taken() -> None:
    stats = statistics(inputs(96))
    ErrorFeedback(stats, "x")
    assert stats.hessian.size == stats.cross.size == 0


def test_inputs_that_depend_on_one_another_are_refused() -> None:
    x = inputs(32)
    x[:, 7] = x[:, 3]
    with pytest.raises(
        InputError, match=r"gives layers.0.ffn depend on one another; expected a text with more variety"
    ):
        ErrorFeedback(statistics(x), "layers.0.ffn", damping=-1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    x = inputs(32)
    x[5, 3] = value
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(InputError, match=r"gives layers.0.ffn inputs that are not finite in float32"),
    ):
        ErrorFeedback(statistics(x), "layers.0.ffn")
