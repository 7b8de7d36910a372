"""A sequence cut into chunks inside a graph, whatever its length."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from retnet_tools.graph.nodes import GraphBuilder

CHUNK_SIZE = 128
"""Tokens of a chunk at most: from here on the CPU's rate is flat, and the T x T matrices grow."""


class Chunks:
    """N chunks of C tokens: C = min(T, 128), N = ceil(T / C). The last one is filled up with zeros.

    Args:
        g: the outermost graph, which gets what all layers share.
        shape: `[B, T, ...]` as a vector of int64.
        length: T, an int64 scalar.

    Attributes:
        size: C, an int64 scalar.
    """

    def __init__(self, g: GraphBuilder, shape: ir.Value, length: ir.Value) -> None:
        one = g.constant("one", np.array(1, dtype=np.int64))
        self.size = g.op("Min", length, g.constant("chunk_size", np.array(CHUNK_SIZE, dtype=np.int64)))
        self._number = g.op("Div", g.op("Add", length, g.op("Sub", self.size, one)), self.size)
        self._length, size, number = (g.op("Unsqueeze", x, g.integers(0)) for x in (length, self.size, self._number))
        batch = g.op("Gather", shape, g.integers(0), axis=0)
        padded = g.op("Mul", number, size)
        self._fill = g.op("Concat", g.integers(0), g.op("Sub", padded, self._length), axis=0)
        self._cut = g.op("Concat", batch, number, size, g.integers(-1), axis=0)
        self._whole = g.op("Concat", batch, padded, g.integers(-1), axis=0)

    def counts(self, g: GraphBuilder, counts: ir.Value) -> ir.Value:
        """Real tokens of each row in each chunk, `[N, B, 1]`, from those of the row, `[B, 1]`."""
        zero, one = (g.constant(name, np.array(i, dtype=np.int64)) for i, name in enumerate(("zero", "one")))
        starts = g.op("Mul", g.op("Range", zero, self._number, one), self.size)
        left = g.op("Sub", counts, g.op("Unsqueeze", starts, g.integers(1, 2)))
        return g.op("Min", g.op("Max", left, zero), self.size)

    def split(self, g: GraphBuilder, x: ir.Value) -> ir.Value:
        """`[B, T, W]` to `[N, B, C, W]`."""
        filled = g.op("Pad", x, self._fill, None, g.integers(1))
        return g.op("Transpose", g.op("Reshape", filled, self._cut), perm=[1, 0, 2, 3])  # [B, N, C, W] -> [N, B, C, W]

    def join(self, g: GraphBuilder, x: ir.Value) -> ir.Value:
        """`[N, B, C, W]` to `[B, T, W]`."""
        whole = g.op("Reshape", g.op("Transpose", x, perm=[1, 0, 2, 3]), self._whole)  # [B, N, C, W] -> [B, N*C, W]
        return g.op("Slice", whole, g.integers(0), self._length, g.integers(1))
