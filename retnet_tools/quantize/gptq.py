"""GPTQ: codes of a matrix chosen one column at a time, each error made up for by the columns that are still to come.

For inputs x of the float model and x' of the quantized one (columns of X and X'), the codes Q of a matrix W are to
minimise |W X - Q X'|^2. With H = 2 X' X'^T and C = 2 (X - X') X'^T that is, but for a constant,

    tr((V - Q) H (V - Q)^T) / 2,   V = W (I + C H^-1)

so V is what is rounded. Where the inputs are the same, V = W, the objective of the paper. Columns are taken in order
of falling diag(H). With H^-1 = U^T U in that order, U upper triangular, column i is rounded to q_i, and

    e_i = (v_i - q_i) / U_ii,   v_j -= e_i U_ij for all j > i

which is what updating H^-1 after each column (Eq. 2 and 3) comes to; columns beyond the next 128 are updated once for
all 128. Scales and zero points are those of round to nearest on V, known beforehand: every column keeps those of the
block that it is stored in, whenever it is taken, and no order has to be stored.

1% of the mean of diag(H) is added to diag(H). A column whose input is always 0 is rounded to nearest.

Sources: Frantar et al. 2022, arXiv 2210.17323 (the columns); activation ordering as in its public code; matching the
float model's outputs: Li et al. 2025, arXiv 2504.02692, here with the closed form above.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from retnet_tools.errors import InputError
from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.quantize.activations import not_finite
from retnet_tools.quantize.blockwise import QuantizedRows, quantize_rows
from retnet_tools.weights import Array

DAMPING = 0.01
COLUMNS = 128
"""Columns after which the rest of the matrix is updated."""


class InputStatistics:
    """H = 2 sum x' x'^T and C = 2 sum (x - x') x'^T over tokens, for x and x' with K elements.

    Products are made in float32 a call at a time, and added up in float64. Memory: 2 K^2 numbers of 8 bytes, and K^2
    of 4 during a call.

    Attributes:
        hessian: H, `[K, K]` float64.
        cross: C, `[K, K]` float64.
    """

    def __init__(self, columns: int) -> None:
        self.hessian = np.zeros((columns, columns))
        self.cross = np.zeros((columns, columns))

    def add(self, float_inputs: Array, inputs: Array) -> None:
        """Take in some tokens.

        Args:
            float_inputs: x, `[n, K]` float32; the same array as `inputs` where x = x'.
            inputs: x', `[n, K]` float32.
        """
        _add_product(self.hessian, inputs, inputs)
        if float_inputs is not inputs:
            _add_product(self.cross, float_inputs - inputs, inputs)

    def take(self) -> tuple[Array, Array]:
        """H and C, which are handed over: what is left is empty."""
        taken = self.hessian, self.cross
        self.hessian, self.cross = (np.zeros((0, 0)) for _ in taken)
        return taken


class ErrorFeedback:
    """Rounds the matrices that read one input.

    Memory: 3 K^2 numbers of 8 bytes while it is made, those of the statistics among them, and 2 K^2 after.

    Args:
        statistics: of the input; they are taken, and empty afterwards.
        name: of what reads it, for the error.
        damping: part of the mean of diag(H) that is added to diag(H).

    Raises:
        InputError: inputs that are not finite in float32, or that depend on one another in spite of the damping.
    """

    def __init__(self, statistics: InputStatistics, name: str, damping: float = DAMPING) -> None:
        hessian, cross = statistics.take()
        if not (np.isfinite(hessian).all() and np.isfinite(cross).all()):
            raise not_finite(name, "inputs")
        diagonal = np.diagonal(hessian).copy()
        scale = diagonal.mean() or 1.0
        np.fill_diagonal(hessian, np.where(diagonal > 0, diagonal, scale) + damping * scale)
        self.order = np.argsort(-diagonal, kind="stable")
        # With rows and columns in reverse order H = L L^T; in the order as it is H = R R^T, R upper triangular, and
        # U = R^-1. C H^-1 = (C L^-T) L^-1. Each step takes the place of what it no longer needs.
        self._reverse = self.order[::-1]
        hessian = hessian[np.ix_(self._reverse, self._reverse)]
        cross = np.take(cross, self._reverse, axis=1)
        lower, failed = torch.linalg.cholesky_ex(torch.from_numpy(hessian))
        if failed:
            raise InputError(
                f"the inputs that the calibration text gives {name} depend on one another",
                "a text with more variety",
                "calibrate on more tokens, or use --method rtn",
            )
        del hessian
        correction = torch.from_numpy(cross)
        torch.linalg.solve_triangular(lower.mT, correction, upper=True, left=False, out=correction)
        torch.linalg.solve_triangular(lower, correction, upper=False, left=False, out=correction)
        inverse = torch.eye(len(lower), dtype=torch.float64)
        torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
        del lower
        self._correction = cross  # C H^-1, columns in reverse order
        self._factor = np.ascontiguousarray(inverse.numpy()[::-1, ::-1])  # U

    def target(self, weight: Array) -> Array:
        """V = W (I + C H^-1), `[n, K]` float64, for rows W `[n, K]`."""
        wide = weight.astype(np.float64)
        wide[:, self._reverse] += wide @ self._correction
        return wide

    def quantize(self, weight: Array, format: BlockFormat, scale_type: np.dtype[Any]) -> QuantizedRows:
        """Codes of some rows `[n, K]`; rows do not depend on one another. Memory: 5 n K numbers of 8 bytes."""
        target = self.target(weight)
        nearest = quantize_rows(target.astype(np.float32), format, scale_type)
        rest = np.ascontiguousarray(target[:, self.order].T)  # [K, n]
        codes = np.empty(rest.shape, dtype=np.uint8)
        grid = _Grid(nearest, format)
        for start in range(0, len(rest), COLUMNS):
            part = slice(start, start + COLUMNS)
            errors = self._round_columns(rest[part], codes[part], start, grid)
            rest[start + COLUMNS :] -= self._factor[part, start + COLUMNS :].T @ errors
        restored = np.empty_like(codes)
        restored[self.order] = codes
        return QuantizedRows(np.ascontiguousarray(restored.T), nearest.scales, nearest.zero_points)

    def _round_columns(self, rest: Array, codes: Array, start: int, grid: _Grid) -> Array:
        """Round the columns `rest` `[c, n]`, which are those from `start` on in the order; their errors e `[c, n]`."""
        errors = np.empty_like(rest)
        for i in range(len(rest)):
            codes[i], rounded = grid.nearest(rest[i], self.order[start + i])
            row = self._factor[start + i, start + i : start + len(rest)]
            errors[i] = (rest[i] - rounded) / row[0]
            rest[i + 1 :] -= row[1:, None] * errors[i]
        return errors


class _Grid:
    """The numbers that the weights of each block may become.

    Args:
        rows: scales and zero points of n rows; their codes are not looked at.
    """

    def __init__(self, rows: QuantizedRows, format: BlockFormat) -> None:
        self._size, self._top = format.block_size, format.top
        self._scales = np.ascontiguousarray(rows.scales.T).astype(np.float64)  # [blocks, n]
        zeros = np.full(rows.scales.shape, format.middle) if rows.zero_points is None else rows.zero_points
        self._zeros = np.ascontiguousarray(zeros.T).astype(np.float64)
        # A block whose scale is 0 has the code of zero everywhere.
        self._inverses = np.divide(1, self._scales, out=np.zeros_like(self._scales), where=self._scales != 0)

    def nearest(self, values: Array, column: int) -> tuple[Array, Array]:
        """Codes of a column `[n]`, and what they stand for."""
        block = column // self._size
        codes = np.rint(values * self._inverses[block])
        codes += self._zeros[block]
        np.clip(codes, 0, self._top, out=codes)
        return codes, (codes - self._zeros[block]) * self._scales[block]


def _add_product(total: Array, left: Array, right: Array) -> None:
    """total += 2 left^T right."""
    product = left.T @ right
    product *= 2
    total += product
