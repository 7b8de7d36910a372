"""Powers of gamma inside a graph: for one token, for chunks of matrix products, for a walk over tokens.

All are float32 exponentials of x = n log(gamma) <= 0. Rounding log(gamma) and the product moves e^x by at most
2 |x| e^x 2^-24 < 2^-24: float32 is enough at any chunk size and any memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx_ir import Value

from retnet_tools.config import RetNetConfig
from retnet_tools.graph.nodes import GraphBuilder
from retnet_tools.weights import Array

CHUNK_SIZE = 128
"""Tokens of a chunk at most: from here on the CPU's rate is flat, and the T x T matrices grow."""


def log_decay(config: RetNetConfig) -> Array:
    """log(gamma) in float64: `[H]`, or `[H, K]` where every pair of key dimensions adds its own."""
    decay = np.array(config.decay)
    if not config.key_decay:
        return decay
    pairs = np.array(config.key_decay).reshape(-1, config.head_k_dim // 2)
    by_key: Array = decay[:, None] + np.repeat(pairs, 2, axis=1)  # [1 or H, K/2] -> [H, K]
    return by_key


@dataclass(frozen=True)
class StepDecay:
    """log(gamma) `[H]` or `[H, K]`, and the graph's position_ids `[B, T]`, which tell operators the batch size."""

    log_gamma: Array
    position_ids: Value

    def rows(self, g: GraphBuilder) -> Value:
        """log(gamma) of every token, `[B, T, H]` or `[B, T, H*K]`, as LinearAttention reads it; once for all layers."""
        return g.once("log_gamma_rows", self._rows)

    def _rows(self, g: GraphBuilder) -> Value:
        table = g.constant("log_gamma", self.log_gamma.astype(np.float32).reshape(1, -1))
        return g.op("Gather", table, g.op("Sub", self.position_ids, self.position_ids), axis=0)


@dataclass(frozen=True)
class ChunkDecay:
    """The terms of Eq. 7 for a chunk of T tokens, of which row b has real ones from a_b up to, without, e_b.

    Attributes:
        matrix: D_nm = gamma^(n-m) for n >= m, else 0, `[H, T, T]`.
        xi: gamma^(j+1-a_b), `[B, H, T, 1]`; 1 before a_b.
        zeta: gamma^(e_b-1-j), `[..., B, H, 1, T]`; 1 from e_b on. k of padded tokens is 0.
        carried: gamma^(e_b-a_b), `[..., B, H, 1, 1]`; 1 for a row of padding alone.
    """

    heads: int
    matrix: Value
    xi: Value
    zeta: Value
    carried: Value


def chunk_decay(g: GraphBuilder, log_gamma: Array, length: Value, start: Value, end: Value) -> ChunkDecay:
    """The powers of a chunk, or of several of one length, made once for all layers.

    Args:
        log_gamma: `[H]`.
        length: T, an int64 scalar.
        start: a_b, `[B, 1]` int64, the same in all chunks; `[1, 1]` where rows agree.
        end: e_b, `[..., B, 1]` int64.
    """
    heads = len(log_gamma)
    logs = g.constant("log_gamma_heads", log_gamma.astype(np.float32).reshape(heads, 1, 1))
    zero, one = g.int64("zero", 0), g.int64("one", 1)

    def powers(exponents: Value) -> Value:
        """gamma^n for int64 exponents `[..., 1, N, M]` as `[..., H, N, M]`."""
        return g.op("Exp", g.op("Mul", g.cast(exponents, "int64", "float32"), logs))

    index = g.op("Range", zero, length, one)  # [T]
    column = g.op("Unsqueeze", index, g.integers(1))  # [T, 1]
    distance = g.op("Max", g.op("Sub", column, index), zero)  # [T, T]
    read = g.op("Max", g.op("Sub", g.op("Add", index, one), start), zero)  # [B, T]
    left = g.op("Max", g.op("Sub", g.op("Sub", end, one), index), zero)  # [..., B, T]
    return ChunkDecay(
        heads,
        matrix=g.op("Trilu", powers(distance), upper=0),
        xi=powers(g.op("Unsqueeze", read, g.integers(1, 3))),  # [B, 1, T, 1]
        zeta=powers(g.op("Unsqueeze", left, g.integers(-3, -2))),  # [..., B, 1, 1, T]
        carried=powers(g.op("Unsqueeze", g.op("Sub", end, start), g.integers(-2, -1))),  # [..., B, 1, 1, 1]
    )


class Chunks:
    """A sequence of any length cut into N chunks of C = min(T, 128) tokens; the last one is filled up with zeros.

    Args:
        g: the outermost graph, which gets what all layers share.
        shape: `[B, T, ...]` as a vector of int64.
        length: T, an int64 scalar.

    Attributes:
        size: C, an int64 scalar.
    """

    def __init__(self, g: GraphBuilder, shape: Value, length: Value) -> None:
        one = g.int64("one", 1)
        self.size = g.op("Min", length, g.int64("chunk_size", CHUNK_SIZE))
        self._number = g.op("Div", g.op("Add", length, g.op("Sub", self.size, one)), self.size)
        self._length, size, number = (g.op("Unsqueeze", x, g.integers(0)) for x in (length, self.size, self._number))
        batch = g.op("Gather", shape, g.integers(0), axis=0)
        padded = g.op("Mul", number, size)
        self._fill = g.op("Concat", g.integers(0), g.op("Sub", padded, self._length), axis=0)
        self._cut = g.op("Concat", batch, number, size, g.integers(-1), axis=0)
        self._whole = g.op("Concat", batch, padded, g.integers(-1), axis=0)

    def counts(self, g: GraphBuilder, counts: Value) -> Value:
        """Real tokens of each row in each chunk, `[N, B, 1]`, from those of the row, `[B, 1]`."""
        zero, one = g.int64("zero", 0), g.int64("one", 1)
        starts = g.op("Mul", g.op("Range", zero, self._number, one), self.size)
        left = g.op("Sub", counts, g.op("Unsqueeze", starts, g.integers(1, 2)))
        return g.op("Min", g.op("Max", left, zero), self.size)

    def split(self, g: GraphBuilder, x: Value) -> Value:
        """`[B, T, W]` to `[N, B, C, W]`."""
        filled = g.op("Pad", x, self._fill, None, g.integers(1))
        return g.op("Transpose", g.op("Reshape", filled, self._cut), perm=[1, 0, 2, 3])  # [B, N, C, W] -> [N, B, C, W]

    def join(self, g: GraphBuilder, x: Value) -> Value:
        """`[N, B, C, W]` to `[B, T, W]`."""
        whole = g.op("Reshape", g.op("Transpose", x, perm=[1, 0, 2, 3]), self._whole)  # [B, N, C, W] -> [B, N*C, W]
        return g.op("Slice", whole, g.integers(0), self._length, g.integers(1))
