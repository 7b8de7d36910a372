"""The sets of operators that graphs are built from: `standard` (ai.onnx only) and `fused` (with com.microsoft).

Both have the same methods, so that the builders do not know which one they use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from onnx_ir import Value

from retnet_tools.config import Activation
from retnet_tools.graph.decay import StepDecay
from retnet_tools.graph.nodes import GraphBuilder, Pair, epsilon
from retnet_tools.graph.standard_ops import OPSET, Fragment, NormWeights, StandardOps, given, head_sizes
from retnet_tools.graph.weight_tensors import BlockedMatrix

MICROSOFT = "com.microsoft"
LOOKUPS = ("Gather", "GatherBlockQuantized")
"""Operators that read some rows of a stored tensor."""


class FusedOps(StandardOps):
    """The same fragments with ONNX Runtime's contrib operators where they are faster.

    Chunks stay matrix products: the CPU kernel of LinearAttention walks token by token, and the CUDA kernel's shared
    memory does not hold RetNet's head sizes.
    """

    name = "fused"
    opsets: ClassVar[Mapping[str, int]] = {"": OPSET, MICROSOFT: 1}
    activations: ClassVar[Mapping[Activation, Fragment]] = {
        **StandardOps.activations,
        "silu": lambda g, x: g.op("QuickGelu", x, domain=MICROSOFT, alpha=1.0),
    }

    def add_norm(self, g: GraphBuilder, x: Value, y: Value, weights: NormWeights) -> Pair:
        """Skip(Simplified)LayerNormalization: norm and sum in one node."""
        norm, bias = weights.norm, weights.bias
        if norm.kind == "rms" and bias is not None:
            return super().add_norm(g, x, y, weights)
        name = {"rms": "SkipSimplifiedLayerNormalization", "layer": "SkipLayerNormalization"}[norm.kind]
        inputs = (x, y, weights.weight, *given(bias))
        normed, mean, deviation, total = g.node(name, *inputs, domain=MICROSOFT, outputs=4, epsilon=epsilon(norm.eps))
        mean.name = deviation.name = ""
        return total, normed

    def linear_blocked(self, g: GraphBuilder, x: Value, matrix: BlockedMatrix, bias: Value | None) -> Value:
        """MatMulNBits."""
        (rows, columns), format = matrix.shape, matrix.format
        shape = (rows, matrix.blocks, format.type.packed_bytes(format.block_size))
        inputs = [x, matrix.part("codes", "rows", "uint8", shape), matrix.scales("rows"), *_zero_points(matrix)]
        if bias is not None:
            inputs += [None] * (5 - len(inputs)) + [bias]
        return g.op(
            "MatMulNBits",
            *inputs,
            domain=MICROSOFT,
            N=rows,
            K=columns,
            bits=format.bits,
            block_size=format.block_size,
            accuracy_level=matrix.accuracy_level or 0,
        )

    def gather_blocked(self, g: GraphBuilder, matrix: BlockedMatrix, ids: Value) -> Value:
        """GatherBlockQuantized, which reads a row with what fills up its last block."""
        (rows, columns), format = matrix.shape, matrix.format
        width = matrix.blocks * format.block_size
        codes = matrix.view("codes", "rows", "uint8", (rows, format.type.packed_bytes(width)))
        x = g.op(
            "GatherBlockQuantized",
            *(codes, ids, matrix.scales("rows"), *_zero_points(matrix)),
            domain=MICROSOFT,
            gather_axis=0,
            quantize_axis=1,
            bits=format.bits,
            block_size=format.block_size,
        )
        if width == columns:
            return x
        return g.op("Slice", x, g.integers(0), g.integers(columns), g.integers(-1))  # [B, T, width] -> [B, T, K]

    def retention_step(self, g: GraphBuilder, q: Value, k: Value, v: Value, past: Value, decay: StepDecay) -> Pair:
        """LinearAttention over one token."""
        return self.retention_tokens(g, q, k, v, past, decay.rows(g))

    def retention_tokens(self, g: GraphBuilder, q: Value, k: Value, v: Value, past: Value, log_gamma: Value) -> Pair:
        """LinearAttention, of a gamma of each head or of each key dimension."""
        return self.linear_attention(g, (q, k, v, past, log_gamma), head_sizes(past)[0])

    def linear_attention(self, g: GraphBuilder, inputs: tuple[Value, ...], heads: int) -> Pair:
        """LinearAttention with the `gated` update: S = exp(log_gamma) S + k (x) v, o = q S."""
        output, present = g.node(
            "LinearAttention",
            *inputs,
            domain=MICROSOFT,
            outputs=2,
            update_rule="gated",
            scale=1.0,
            q_num_heads=heads,
            kv_num_heads=heads,
        )
        return output, present


def _zero_points(matrix: BlockedMatrix) -> list[Value | None]:
    """As MatMulNBits and GatherBlockQuantized read them; none where they are the middle."""
    if matrix.format.symmetric:
        return []
    shape = (matrix.shape[0], matrix.format.type.packed_bytes(matrix.blocks))
    return [matrix.part("zero_points", "rows", "uint8", shape)]


OPERATOR_SETS: dict[str, StandardOps] = {ops.name: ops for ops in (StandardOps(), FusedOps())}
