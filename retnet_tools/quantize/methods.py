"""How the codes of a matrix are chosen: one row a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import UsageError, find_row
from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.progress import Progress
from retnet_tools.quantize.blockwise import QuantizedRows, quantize_rows
from retnet_tools.quantize.calibration import CalibrationText
from retnet_tools.quantize.unfinished import Workplace
from retnet_tools.weights import Array, WeightSource

Method = Callable[[str, Array, BlockFormat, np.dtype[Any]], QuantizedRows]
"""Of a matrix `[N, K]` by its canonical name, the next rows `[n, K]` float32, finite, in storage order, its format and
the type that scales are stored in."""


@dataclass(frozen=True)
class MethodTask:
    """What a method is made for.

    Attributes:
        weights: the float weights.
        formats: of every matrix by canonical name; None where it stays float.
        dtype: the float type of the export, which weights are rounded to first, and which scales are stored in.
        text: for a calibrated method.
        work: the place for what is worth keeping if the run is stopped; whoever writes the output removes it.
    """

    config: RetNetConfig
    weights: WeightSource
    formats: Mapping[str, BlockFormat | None]
    dtype: np.dtype[Any]
    text: CalibrationText | None
    work: Workplace
    progress: Progress


@dataclass(frozen=True)
class MethodSpec:
    """A row of the table of methods.

    Attributes:
        calibrated: whether it learns from a text, which it does when it is made.
    """

    name: str
    calibrated: bool
    make: Callable[[MethodTask], Method]


def round_to_nearest(name: str, rows: Array, format: BlockFormat, scale_type: np.dtype[Any]) -> QuantizedRows:
    """Each weight by itself, with scales of least squared error."""
    return quantize_rows(rows, format, scale_type)


def _gptq(task: MethodTask) -> Method:
    # torch is not to be loaded where nothing is calibrated.
    from retnet_tools.quantize.gptq_run import Gptq

    return Gptq(task)


METHODS: dict[str, MethodSpec] = {
    spec.name: spec
    for spec in (
        MethodSpec("rtn", calibrated=False, make=lambda task: round_to_nearest),
        MethodSpec("gptq", calibrated=True, make=_gptq),
    )
}


def find_method(name: str, text: CalibrationText | None) -> MethodSpec:
    """The method of this name.

    Raises:
        UsageError: no such method, or a calibrated one without a text.
    """
    spec = find_row(METHODS, "--method", name)
    if spec.calibrated and text is None:
        raise UsageError(
            f"--method {name} without a text to calibrate on", "--calibration FILE", "name one, or use --method rtn"
        )
    return spec
