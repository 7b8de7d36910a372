"""The operator sets as graphs for CUDA use them: what has a kernel there, in the shapes that the kernels take.

They compute the same as those for the CPU, and run there too.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx_ir import Value

from retnet_tools.config import Activation
from retnet_tools.graph.cuda_retention import step_form, tokens_form
from retnet_tools.graph.decay import StepDecay, TokenDecay
from retnet_tools.graph.nodes import GraphBuilder, Pair
from retnet_tools.graph.ops import FusedOps
from retnet_tools.graph.standard_ops import StandardOps
from retnet_tools.graph.weight_tensors import BlockedMatrix
from retnet_tools.weights import Array


class CudaStandardOps(StandardOps):
    """ai.onnx operators that have CUDA kernels in every type."""

    def wide_features(self, g: GraphBuilder, feature_map: Activation | None, x: Value, dtype: str) -> Value:
        """In float32 from the start, since LeakyRelu has no bfloat16 there; Elu, which has no kernel, in parts.

        Elu(x) = Relu(x) + e^min(x, 0) - 1.
        """
        x = g.cast(x, dtype, "float32")
        if feature_map == "elu":
            zero, one = g.float32("elu_0", 0), g.float32("elu_1", 1)
            return g.op("Add", g.op("Relu", x), g.op("Sub", g.op("Exp", g.op("Min", x, zero)), one))
        return x if feature_map is None else self.activate(g, feature_map, x)

    def dequantize(self, g: GraphBuilder, matrix: BlockedMatrix, codes: Value, *others: Value) -> Value:
        """(code - zero point) * scale, whose whole numbers every float type holds: DequantizeLinear knows no blocks of
        bytes there, and no bfloat16.
        """
        (columns, size), (scales, *zeros) = (matrix.shape[1], matrix.format.block_size), others
        block = g.constant(f"blocks_{columns}_{size}", np.arange(columns, dtype=np.int64) // size)
        steps = g.cast(codes, "int8", matrix.dtype)
        for points in zeros:
            steps = g.op("Sub", steps, g.op("Gather", g.cast(points, "uint8", matrix.dtype), block, axis=-1))
        return g.op("Mul", steps, g.op("Gather", scales, block, axis=-1))


class CudaFusedOps(FusedOps, CudaStandardOps):
    """With ONNX Runtime's contrib operators; retention in the form of `retnet_tools.graph.cuda_retention`."""

    def retention_step(self, g: GraphBuilder, q: Value, k: Value, v: Value, past: Value, decay: StepDecay) -> Pair:
        """LinearAttention over one token, with split keys where that meets a better kernel, or matrix products."""
        form = step_form(*_head_sizes(past))
        if form.kernel is None:
            return StandardOps.retention_step(self, g, q, k, v, past, decay)
        split = StepDecay(_split_log_gamma(decay.log_gamma, form.key_splits), decay.position_ids)
        tokens = replace(split.tokens(g), heads=len(decay.log_gamma))
        return self.split_keys(g, q, k, v, past, tokens, form.key_splits)

    def retention_tokens(self, g: GraphBuilder, q: Value, k: Value, v: Value, past: Value, decay: TokenDecay) -> Pair:
        """LinearAttention, with split keys where the shape would be refused, or a Scan.

        `decay` is of each key dimension, `[B, T, H*K]`, which splits with the keys as it stands.
        """
        form = tokens_form(*_head_sizes(past))
        if form.kernel is None:
            return StandardOps.retention_tokens(self, g, q, k, v, past, decay)
        return self.split_keys(g, q, k, v, past, decay, form.key_splits)

    def split_keys(
        self, g: GraphBuilder, q: Value, k: Value, v: Value, past: Value, decay: TokenDecay, parts: int
    ) -> Pair:
        """q S = sum_s q_s S_s: each head is `parts` heads of K / parts that share v.

        Of q, k `[B, T, H*K]`, v `[B, T, H*V]` and the past S `[B, H, K, V]`: o `[B, T, H*V]` and the last S.

        Args:
            decay: of the H heads; its log_gamma is `[B, T, H*parts]` or `[B, T, H*K]`.
        """
        if parts == 1:
            return super().retention_tokens(g, q, k, v, past, decay)
        heads, (head_k_dim, head_v_dim) = decay.heads, _head_sizes(past)
        value = g.reshape(v, 0, 0, heads, 1, head_v_dim)  # [B, T, H*V] -> [B, T, H, 1, V]
        value = g.op("Expand", value, g.integers(1, 1, 1, parts, 1))
        value = g.reshape(value, 0, 0, heads * parts * head_v_dim)
        state = g.reshape(past, 0, heads * parts, head_k_dim // parts, head_v_dim)
        output, present = super().retention_tokens(g, q, k, value, state, replace(decay, heads=heads * parts))
        output = g.reshape(output, 0, 0, heads, parts, head_v_dim)  # [B, T, H*parts*V] -> [B, T, H, parts, V]
        sizes = g.integers(*[1] * parts)
        output = g.op("Sum", *g.node("Split", output, sizes, outputs=parts, axis=3))  # [B, T, H, 1, V]
        return g.reshape(output, 0, 0, heads * head_v_dim), g.reshape(present, 0, heads, head_k_dim, head_v_dim)


def _head_sizes(past: Value) -> tuple[int, int]:
    """K and V of a state `[B, H, K, V]`."""
    assert past.shape is not None
    _, _, head_k_dim, head_v_dim = past.shape
    assert isinstance(head_k_dim, int)
    assert isinstance(head_v_dim, int)
    return head_k_dim, head_v_dim


def _split_log_gamma(log_gamma: Array, parts: int) -> Array:
    """log(gamma) of each part: `[H]` repeated; `[H, K]` is cut up as it stands, `[H * parts, K/parts]`."""
    return np.repeat(log_gamma, parts) if log_gamma.ndim == 1 else log_gamma.reshape(len(log_gamma) * parts, -1)
