"""How the codes of a matrix are chosen: methods behind one interface.

A method sees a matrix in pieces of whole rows, in storage order, under its canonical name, and gives codes, scales
and zero points back. A calibrated one learns from a text first, when it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import UsageError, did_you_mean
from retnet_tools.graph.quantization import BlockFormat, Calibration
from retnet_tools.quantize.blockwise import QuantizedRows, quantize_rows
from retnet_tools.weights import Array, WeightSource


class Method(Protocol):
    """Chooses codes."""

    def quantize(self, name: str, rows: Array, format: BlockFormat, scale_type: np.dtype[Any]) -> QuantizedRows:
        """Some rows of a matrix.

        Args:
            name: canonical name of the matrix `[N, K]`.
            rows: the next rows of it, `[n, K]` float32, finite.
            scale_type: the type that scales are stored in.
        """
        ...


@dataclass(frozen=True)
class CalibrationText:
    """A text to learn from.

    Attributes:
        record: what retnet.json says of it.
        sequences: its tokens, `[T]` int64 each.
    """

    record: Calibration
    sequences: Sequence[Array]


@dataclass(frozen=True)
class MethodSpec:
    """A row of the table of methods.

    Attributes:
        calibrated: whether it needs a text.
        make: the method for a model, its float weights and a text.
    """

    name: str
    calibrated: bool
    make: Callable[[RetNetConfig, WeightSource, CalibrationText | None], Method]


class RoundToNearest:
    """Each weight by itself, with scales of least squared error."""

    def quantize(self, name: str, rows: Array, format: BlockFormat, scale_type: np.dtype[Any]) -> QuantizedRows:
        """See `retnet_tools.quantize.blockwise.quantize_rows`."""
        return quantize_rows(rows, format, scale_type)


METHODS: dict[str, MethodSpec] = {
    spec.name: spec for spec in (MethodSpec("rtn", calibrated=False, make=lambda *_: RoundToNearest()),)
}


def find_method(name: str, text: CalibrationText | None) -> MethodSpec:
    """The method of this name.

    Raises:
        UsageError: no such method, a calibrated one without a text, or a text for one that learns nothing from it.
    """
    if name not in METHODS:
        raise UsageError(f"--method {name!r}", f"one of {', '.join(METHODS)}", did_you_mean(name, METHODS))
    spec = METHODS[name]
    if spec.calibrated and text is None:
        raise UsageError(f"--method {name} without a text", "a text to calibrate on", "name one, or use --method rtn")
    if not spec.calibrated and text is not None:
        raise UsageError(f"a text to calibrate on with --method {name}", "a calibrated method")
    return spec
