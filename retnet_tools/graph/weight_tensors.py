"""What weights.data holds, tensor by tensor, known before any weight is read; quantized matrices among them, and how a
row of one is looked up with ai.onnx operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.graph.contract import TensorSpec
from retnet_tools.graph.nodes import ELEMENT_TYPES, GraphBuilder, tensor_type
from retnet_tools.graph.quantization import AccuracyLevel
from retnet_tools.weights import Array

Layout = Literal["rows", "columns"]
PartName = Literal["codes", "scales", "zero_points"]


@dataclass(frozen=True)
class QuantizedPart:
    """Which part of a quantized matrix `[N, K]` a tensor holds.

    Attributes:
        layout: `rows` for MatMulNBits, `columns` for DequantizeLinear; see `retnet_tools.quantize.contents`.
    """

    name: PartName
    format: BlockFormat
    layout: Layout


@dataclass(frozen=True)
class WeightTensor:
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

    @property
    def stored_bytes(self) -> int:
        """Bytes in weights.data; none of its own where it shares those of another."""
        size = math.ceil(math.prod(self.shape) * ELEMENT_TYPES[self.dtype].itemsize)
        return size if self.same_as is None else 0

    def declared(self, initializers: dict[str, Value], stored: dict[str, WeightTensor]) -> Value:
        """The graph value of the tensor, entered in both once for each name."""
        if self.name not in stored:
            stored[self.name] = self
            initializers[self.name] = Value(name=self.name, shape=ir.Shape(self.shape), type=tensor_type(self.dtype))
        return initializers[self.name]


@dataclass(frozen=True)
class BuiltGraph:
    """A graph, its border, and the tensors that it expects in weights.data."""

    graph: ir.Graph
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    stored: dict[str, WeightTensor]


@dataclass(frozen=True)
class BlockedMatrix:
    """A matrix `[N, K]` of codes, scales and zero points.

    Attributes:
        name: of the stored tensor that it replaces; its parts are named after it.
        sources: canonical names of the matrices that it consists of, one after another along N.
        dtype: of its scales and of what it is multiplied with.
        accuracy_level: of MatMulNBits.
        shared: whether it is both multiplied with and looked up in, as a tied embedding is: stored once all the same.
        declare: makes a graph value of a stored tensor.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, int]
    format: BlockFormat
    dtype: str
    accuracy_level: AccuracyLevel | None
    shared: bool
    declare: Callable[[WeightTensor], Value]

    @property
    def blocks(self) -> int:
        """Blocks in a row."""
        return self.format.blocks(self.shape[1])

    def part(self, part: PartName, layout: Layout, dtype: str, shape: tuple[int, ...]) -> Value:
        """A part as it is stored."""
        content = QuantizedPart(part, self.format, layout)
        return self.declare(WeightTensor(f"{self.name}.{part}", dtype, shape, self.sources, part=content))

    def view(self, part: PartName, layout: Layout, dtype: str, shape: tuple[int, ...]) -> Value:
        """A part for the lookup, which may have another shape or type than the product's; the same bytes."""
        if not self.shared:
            return self.part(part, layout, dtype, shape)
        return self.declare(WeightTensor(f"{self.name}.{part}.view", dtype, shape, same_as=f"{self.name}.{part}"))

    def scales(self, layout: Layout) -> Value:
        """One scale a block."""
        shape = (self.shape[0], self.blocks)
        return self.part("scales", layout, self.dtype, shape if layout == "rows" else shape[::-1])


def blocked_rows(g: GraphBuilder, matrix: BlockedMatrix, ids: Value) -> list[Value]:
    """Columns `ids` `[B, T]` as rows of codes `[B, T, K]`, scales `[B, T, blocks]` and, if it has any, zero points."""
    # Views, since ONNX Runtime makes no MatMulNBits of parts that another node reads too.
    scales = matrix.view("scales", "columns", matrix.dtype, (matrix.blocks, matrix.shape[0]))
    zeros = [] if matrix.format.symmetric else [_integers(g, matrix, "zero_points", matrix.blocks, ids)]
    return [_integers(g, matrix, "codes", matrix.shape[1], ids), _column_values(g, scales, ids), *zeros]


def stored_integer(format: BlockFormat) -> str:
    """The type of codes stored by columns: symmetric ones are signed, and need no zero point."""
    return f"{'' if format.symmetric else 'u'}{format.type.element}"


def _column_values(g: GraphBuilder, matrix: Value, ids: Value) -> Value:
    """Columns `ids` `[B, T]` of `[R, N]`, as `[B, T, R]`."""
    return g.op("Transpose", g.op("Gather", matrix, ids, axis=1), perm=[1, 2, 0])


def _integers(g: GraphBuilder, matrix: BlockedMatrix, part: PartName, rows: int, ids: Value) -> Value:
    """Columns `ids` of a part `[rows, N]`, as `[B, T, rows]` of a byte each."""
    columns, kind, bits = matrix.shape[0], stored_integer(matrix.format), matrix.format.bits
    if ELEMENT_TYPES[kind].itemsize >= 1:
        return _column_values(g, matrix.view(part, "columns", kind, (rows, columns)), ids)
    # Gather knows no types below a byte. Some codes share one, row after row: where N is odd, across rows.
    packed = matrix.view(part, "columns", "uint8", (matrix.format.type.packed_bytes(rows * columns),))
    starts = g.constant(f"starts_{rows}_{columns}", np.arange(rows, dtype=np.int64) * columns)
    place = g.op("Add", g.op("Unsqueeze", ids, g.integers(-1)), starts)  # [B, T] -> [B, T, rows]
    count, end = (g.int64(f"int64_{n}", n) for n in (8 // bits, 1 << bits))
    byte = g.cast(g.op("Gather", packed, g.op("Div", place, count)), "uint8", "int64")
    # The low bits come first. In whole numbers, since CUDA has no kernels for bits.
    unit = g.op("Gather", g.integers(*(1 << bit for bit in range(0, 8, bits))), g.op("Mod", place, count))
    code = g.op("Mod", g.op("Div", byte, unit), end)
    if not matrix.format.symmetric:
        return g.cast(code, "int64", "uint8")
    middle = matrix.format.middle
    signed = np.array([*range(middle), *range(-middle, 0)], dtype=np.int8)
    return g.op("Gather", g.constant(f"signed_{bits}_bits", signed), code)
