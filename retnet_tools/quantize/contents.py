"""The content of a quantized weights.data, made tensor by tensor while it is written. Codes lie as the operators read
them, side by side, the low bits of a byte first.

    rows      MatMulNBits and GatherBlockQuantized: codes [N, blocks, block_size * bits / 8] uint8, the last block of a
              row filled up with its zero point; scales [N, blocks]; zero points [N, ceil(blocks * bits / 8)] uint8
    columns   DequantizeLinear along the first axis, then MatMul: codes [K, N], scales [blocks, N], zero points
              [blocks, N]; signed (code less 2^(bits-1)) if symmetric, else unsigned. Types below a byte are packed over
              the whole tensor, as ONNX stores them

A matrix may be packed by rows piece by piece; by columns it has to be there as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from retnet_tools.dtypes import convert_array
from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.graph.folder import float_blocks
from retnet_tools.graph.nodes import ELEMENT_TYPES
from retnet_tools.graph.weight_tensors import Layout, PartName, QuantizedPart, WeightTensor
from retnet_tools.quantize.blockwise import QuantizedRows, count_coarse_blocks, join_rows
from retnet_tools.quantize.methods import Method
from retnet_tools.weights import Array, FiniteWeights, WeightSource


class QuantizedContents:
    """A `BlockReader`: float tensors as they are, matrices quantized while their codes are asked for.

    Scales and zero points of a matrix wait until they are asked for, right after its codes. Memory: some blocks of
    16 MB and the scales of one matrix; for the layout by columns also the codes of one matrix.

    Args:
        source: float weights by canonical name. Values are rounded to `dtype` first, as an export would store them.
        dtype: the float type of the export: of scales, and of what stays float.

    Attributes:
        coarse_blocks: blocks so far whose scale is inexact, see `retnet_tools.quantize.blockwise.count_coarse_blocks`.
    """

    def __init__(self, source: WeightSource, method: Method, dtype: str) -> None:
        self._source, self._method = FiniteWeights(source), method
        self._type = ELEMENT_TYPES[dtype].numpy()
        self._floats = float_blocks(self._source)
        self.coarse_blocks = 0
        self._waiting: dict[tuple[tuple[str, ...], PartName], Array] = {}

    def __call__(self, tensor: WeightTensor) -> Iterator[Array]:
        """The content of a tensor, in pieces, in order.

        Raises:
            InputError: NaN or infinities, or a value that `dtype` cannot hold, by tensor name.
        """
        part = tensor.part
        if part is None:
            yield from self._floats(tensor)
        elif part.name == "codes":
            yield from self._codes(tensor.sources, part)
        else:
            yield self._waiting.pop((tensor.sources, part.name))

    def _codes(self, sources: tuple[str, ...], part: QuantizedPart) -> Iterator[Array]:
        pieces = self._quantized(sources, part.format)
        if part.layout == "columns":
            pieces = iter([join_rows(list(pieces))])
        scales, zeros = [], []
        for rows in pieces:
            codes, scale, zero = pack(rows, part.format, part.layout)
            yield codes
            scales.append(scale)
            zeros += [] if zero is None else [zero]
        self._waiting[sources, "scales"] = np.concatenate(scales)
        if zeros:
            self._waiting[sources, "zero_points"] = np.concatenate(zeros)

    def _quantized(self, sources: tuple[str, ...], format: BlockFormat) -> Iterator[QuantizedRows]:
        for name in sources:
            for block in self._source.blocks(name):
                rows = convert_array(name, block, self._type).astype(np.float32, copy=False)
                quantized = self._method(name, rows, format, self._type)
                self.coarse_blocks += count_coarse_blocks(rows, quantized, format)
                yield quantized


def pack(rows: QuantizedRows, format: BlockFormat, layout: Layout) -> tuple[Array, Array, Array | None]:
    """Codes, scales and zero points as stored; types below a byte as their bytes, in one dimension."""
    codes, scales, zeros, packed = rows.codes, rows.scales, rows.zero_points, format.type.pack
    if layout == "rows":
        filler = format.middle if zeros is None else zeros[:, -1:]
        whole = np.empty((len(codes), format.blocks(codes.shape[1]) * format.block_size), dtype=np.uint8)
        whole[:, : codes.shape[1]], whole[:, codes.shape[1] :] = codes, filler
        return packed(whole).reshape(*scales.shape, -1), scales, None if zeros is None else packed(zeros)
    stored = [np.ascontiguousarray(codes.T - np.uint8(format.middle if zeros is None else 0))]
    stored += [] if zeros is None else [np.ascontiguousarray(zeros.T)]
    if ELEMENT_TYPES[format.type.element].itemsize < 1:
        stored = [packed(part.reshape(-1)) for part in stored]
    return stored[0], np.ascontiguousarray(scales.T), None if zeros is None else stored[1]
