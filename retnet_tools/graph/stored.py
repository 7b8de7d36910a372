"""What weights.data holds, tensor by tensor, known before any weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from retnet_tools.graph.nodes import ELEMENT_TYPES
from retnet_tools.graph.quantization import BlockFormat
from retnet_tools.weights import Array

Layout = Literal["rows", "columns"]
PartName = Literal["codes", "scales", "zero_points"]


@dataclass(frozen=True)
class QuantizedPart:
    """Which part of a quantized matrix `[N, K]` a tensor holds.

    Attributes:
        layout: `rows` for MatMulNBits, `columns` for DequantizeLinear; see `retnet_tools.quantize.packing`.
    """

    name: PartName
    format: BlockFormat
    layout: Layout


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of weights.data: canonical tensors one after another along the first axis, or a computed table.

    Attributes:
        sources: canonical names; empty for a table.
        table: the data of a table.
        part: what it holds of its sources, which are quantized then; None holds them as they are. The parts of a
            matrix follow one another: codes, scales, zero points.
        same_as: the tensor whose bytes it shares, under another shape or type.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    table: Array | None = None
    part: QuantizedPart | None = None
    same_as: str | None = None


def stored_bytes(tensor: StoredTensor) -> int:
    """Bytes of a tensor in weights.data; none of its own where it shares those of another."""
    if tensor.same_as is not None:
        return 0
    return math.ceil(math.prod(tensor.shape) * ELEMENT_TYPES[tensor.dtype].itemsize)
