"""Codes as the operators read them: bits side by side, the low bits of a byte first.

    rows      MatMulNBits and GatherBlockQuantized: codes [N, blocks, block_size * bits / 8] uint8, the last block of a
              row filled up with its zero point; scales [N, blocks]; zero points [N, ceil(blocks * bits / 8)] uint8
    columns   DequantizeLinear along the first axis, then MatMul: codes [K, N], scales [blocks, N], zero points
              [blocks, N]; int4 and int8 (code less 2^(bits-1)) if symmetric, else uint4 and uint8. Types of four bits
              are packed over the whole tensor, as ONNX stores them

A matrix may be packed by rows piece by piece; by columns it has to be there as a whole.
"""

from __future__ import annotations

import numpy as np

from retnet_tools.graph.nodes import ELEMENT_TYPES
from retnet_tools.graph.quantization import BlockFormat
from retnet_tools.graph.weight_tensors import Layout
from retnet_tools.quantize.blockwise import QuantizedRows
from retnet_tools.weights import Array


def pack(rows: QuantizedRows, format: BlockFormat, layout: Layout) -> tuple[Array, Array, Array | None]:
    """Codes, scales and zero points as stored; types below a byte as their bytes, in one dimension."""
    codes, scales, zeros = rows.codes, rows.scales, rows.zero_points
    if layout == "rows":
        pack_codes = format.type.pack
        packed = pack_codes(_fill(codes, zeros, format)).reshape(*scales.shape, -1)
        return np.ascontiguousarray(packed), scales, None if zeros is None else pack_codes(zeros)
    middle = np.uint8(format.middle if format.symmetric else 0)
    return (
        _whole(codes.T - middle, format),
        np.ascontiguousarray(scales.T),
        None if zeros is None else _whole(zeros.T, format),
    )


def _fill(codes: Array, zeros: Array | None, format: BlockFormat) -> Array:
    """`[N, K]` to `[N, blocks * block_size]`, with codes that mean 0."""
    rows, columns = codes.shape
    width = format.blocks(columns) * format.block_size
    if width == columns:
        return codes
    filled = np.empty((rows, width), dtype=np.uint8)
    filled[:, columns:] = format.middle if zeros is None else zeros[:, -1:]
    filled[:, :columns] = codes
    return filled


def _whole(codes: Array, format: BlockFormat) -> Array:
    """A matrix as ONNX stores it: `[rows, columns]` of bytes, or one row of codes side by side."""
    codes = np.ascontiguousarray(codes)
    return format.type.pack(codes.reshape(-1)) if ELEMENT_TYPES[format.type.element].itemsize < 1 else codes
