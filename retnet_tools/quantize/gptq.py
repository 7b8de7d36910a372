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

from retnet_tools.errors import InputError
from retnet_tools.graph.quantization import BlockFormat
from retnet_tools.quantize.blockwise import QuantizedRows, quantize_rows
from retnet_tools.weights import Array

DAMPING = 0.01
COLUMNS = 128
"""Columns after which the rest of the matrix is updated."""


class InputStatistics:
    """H = 2 sum x' x'^T and C = 2 sum (x - x') x'^T over tokens, for x and x' with K elements.

    Products are made in float32 a call at a time, and added up in float64. Memory: 2 K^2 numbers of 8 bytes.

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
            float_inputs: x, `[n, K]` float32.
            inputs: x', `[n, K]` float32.
        """
        self.hessian += 2 * (inputs.T @ inputs)
        self.cross += 2 * ((float_inputs - inputs).T @ inputs)


class ErrorFeedback:
    """Rounds the matrices that read one input. Memory: about 5 K^2 numbers of 8 bytes while it is made, 2 K^2 after.

    Args:
        statistics: of the input.
        name: of what reads it, for the error.
        damping: part of the mean of diag(H) that is added to diag(H).

    Raises:
        InputError: inputs that are not finite in float32.
    """

    def __init__(self, statistics: InputStatistics, name: str, damping: float = DAMPING) -> None:
        hessian = statistics.hessian.copy()
        if not (np.isfinite(hessian).all() and np.isfinite(statistics.cross).all()):
            raise InputError(
                f"the calibration text gives {name} inputs that are not finite in float32",
                "a model that float32 can compute with",
                "use --method rtn",
            )
        diagonal = np.diagonal(hessian).copy()
        scale = diagonal.mean() or 1.0
        np.fill_diagonal(hessian, np.where(diagonal > 0, diagonal, scale) + damping * scale)
        self.order = np.argsort(-diagonal, kind="stable")
        self._correction = np.linalg.solve(hessian, statistics.cross.T).T  # C H^-1
        self._factor = _inverse_factor(hessian[np.ix_(self.order, self.order)])

    def target(self, weight: Array) -> Array:
        """V = W (I + C H^-1), `[n, K]` float64, for rows W `[n, K]`."""
        wide = weight.astype(np.float64)
        wide += wide @ self._correction
        return wide

    def quantize(self, weight: Array, format: BlockFormat, scale_type: np.dtype[Any]) -> QuantizedRows:
        """Codes of some rows `[n, K]`; rows do not depend on one another. Memory: 5 n K numbers of 8 bytes."""
        target = self.target(weight)
        nearest = quantize_rows(target.astype(np.float32), format, scale_type)
        rest = np.ascontiguousarray(target[:, self.order].T)  # [K, n]
        codes = np.empty(rest.shape, dtype=np.uint8)
        for start in range(0, len(rest), COLUMNS):
            part = slice(start, start + COLUMNS)
            errors = self._round_columns(rest[part], codes[part], start, nearest, format)
            rest[start + COLUMNS :] -= self._factor[part, start + COLUMNS :].T @ errors
        restored = np.empty_like(codes)
        restored[self.order] = codes
        return QuantizedRows(np.ascontiguousarray(restored.T), nearest.scales, nearest.zero_points)

    def _round_columns(
        self, rest: Array, codes: Array, start: int, nearest: QuantizedRows, format: BlockFormat
    ) -> Array:
        """Round the columns `rest` `[c, n]`, which are those from `start` on in the order; their errors e `[c, n]`."""
        errors = np.empty_like(rest)
        for i in range(len(rest)):
            block = self.order[start + i] // format.block_size
            scale = nearest.scales[:, block].astype(np.float64)
            zero = format.middle if nearest.zero_points is None else nearest.zero_points[:, block].astype(np.float64)
            steps = np.divide(rest[i], scale, out=np.zeros_like(scale), where=scale != 0)
            codes[i] = code = np.clip(np.rint(steps) + zero, 0, format.top)
            row = self._factor[start + i, start + i : start + len(rest)]
            errors[i] = (rest[i] - (code - zero) * scale) / row[0]
            rest[i + 1 :] -= row[1:, None] * errors[i]
        return errors


def _inverse_factor(matrix: Array) -> Array:
    """The upper triangular U with U^T U = matrix^-1, for a positive definite matrix.

    With rows and columns in reverse order matrix = L L^T; in the order as it is then matrix = R R^T, R upper
    triangular, and U = R^-1.
    """
    upper = np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
    inverse: Array = np.linalg.inv(upper)
    return inverse
