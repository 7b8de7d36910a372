"""The sets of operators that graphs are built from: `standard` (ai.onnx only) and `fused` (with com.microsoft).

All have the same methods, so that the builders do not know which one they use. A name may have sets of several opsets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from onnx_ir import Value

from retnet_tools.config import Activation, BlockNorm
from retnet_tools.graph.contract import LINEAR_ATTENTION_OPSET, OPSET
from retnet_tools.graph.decay import ChunkDecay, Chunks, StepDecay
from retnet_tools.graph.nodes import GraphBuilder, Pair, epsilon, scan
from retnet_tools.graph.weight_tensors import BlockedMatrix, blocked_rows, stored_integer

MICROSOFT = "com.microsoft"
LOOKUPS = ("Gather", "GatherBlockQuantized")
"""Operators that read some rows of a stored tensor."""
Fragment = Callable[[GraphBuilder, Value], Value]


def _relu2(g: GraphBuilder, x: Value) -> Value:
    y = g.op("Relu", x)
    return g.op("Mul", y, y)


@dataclass(frozen=True)
class NormWeights:
    """The parameters of a block norm as graph values."""

    norm: BlockNorm
    weight: Value
    bias: Value | None


class StandardOps:
    """Graph fragments of ai.onnx operators only."""

    name = "standard"
    opsets: ClassVar[Mapping[str, int]] = {"": OPSET}
    activations: ClassVar[Mapping[Activation, Fragment]] = {
        "gelu": lambda g, x: g.op("Gelu", x),
        "gelu_tanh": lambda g, x: g.op("Gelu", x, approximate="tanh"),
        "silu": lambda g, x: g.op("Mul", x, g.op("Sigmoid", x)),
        "relu": lambda g, x: g.op("Relu", x),
        "relu2": _relu2,
        "leaky_relu": lambda g, x: g.op("LeakyRelu", x),
        "elu": lambda g, x: g.op("Elu", x),
        "sigmoid": lambda g, x: g.op("Sigmoid", x),
        "tanh": lambda g, x: g.op("Tanh", x),
    }

    @property
    def opset(self) -> int:
        """The version of ai.onnx."""
        return self.opsets[""]

    def activate(self, g: GraphBuilder, activation: Activation, x: Value) -> Value:
        """Any activation of the configuration."""
        return self.activations[activation](g, x)

    def wide_features(self, g: GraphBuilder, feature_map: Activation | None, x: Value, dtype: str) -> Value:
        """The feature map of q or k, where there is one, of x in `dtype`, in float32."""
        return g.cast(x if feature_map is None else self.activate(g, feature_map, x), dtype, "float32")

    def norm(self, g: GraphBuilder, x: Value, weights: NormWeights) -> Value:
        """RMSNorm or LayerNorm over the last dimension, accumulated in float32."""
        eps, bias = epsilon(weights.norm.eps), weights.bias
        if weights.norm.kind == "rms":
            y = g.op("RMSNormalization", x, weights.weight, axis=-1, epsilon=eps)
            return y if bias is None else g.op("Add", y, bias)
        return g.op("LayerNormalization", x, weights.weight, *given(bias), axis=-1, epsilon=eps)

    def add_norm(self, g: GraphBuilder, x: Value, y: Value, weights: NormWeights) -> Pair:
        """x + y, and the norm of it, for `[rows, D]`."""
        total = g.op("Add", x, y)
        return total, self.norm(g, total, weights)

    def linear_blocked(self, g: GraphBuilder, x: Value, matrix: BlockedMatrix, bias: Value | None) -> Value:
        """y = x W^T + b for a quantized W `[N, K]` and x `[rows, K]`.

        ONNX Runtime makes one MatMulNBits of these nodes, since blocks run along the first axis.
        """
        kind = stored_integer(matrix.format)
        inputs = [matrix.part("codes", "columns", kind, matrix.shape[::-1]), matrix.scales("columns")]
        if not matrix.format.symmetric:
            inputs.append(matrix.part("zero_points", "columns", kind, (matrix.blocks, matrix.shape[0])))
        weight = g.op("DequantizeLinear", *inputs, axis=0, block_size=matrix.format.block_size)
        return g.op("Gemm", x, weight, *given(bias))

    def gather_blocked(self, g: GraphBuilder, matrix: BlockedMatrix, ids: Value) -> Value:
        """Rows of a quantized matrix `[N, K]`: `[B, T]` int64 to `[B, T, K]`."""
        return self.dequantize(g, matrix, *blocked_rows(g, matrix, ids))

    def dequantize(self, g: GraphBuilder, matrix: BlockedMatrix, codes: Value, *others: Value) -> Value:
        """w of rows as `blocked_rows` gives them."""
        return g.op("DequantizeLinear", codes, *others, axis=-1, block_size=matrix.format.block_size)

    def retention_step(self, g: GraphBuilder, q: Value, k: Value, v: Value, past: Value, decay: StepDecay) -> Pair:
        """S_n = gamma S_(n-1) + k_n^T v_n, o_n = q_n S_n (Eq. 6) for one token, in float32.

        Of q, k `[B, 1, H*K]`, v `[B, 1, H*V]` and the past S `[B, H, K, V]`: o `[B, 1, H*V]` and S_n.
        """
        heads = len(decay.log_gamma)
        gamma = g.constant("gamma", np.exp(decay.log_gamma).astype(np.float32).reshape(1, heads, -1, 1))
        key = g.reshape(k, 0, heads, -1, 1)  # [B, H, K, 1]
        value = g.reshape(v, 0, heads, 1, -1)  # [B, H, 1, V]
        present = g.op("Add", g.op("Mul", past, gamma), g.op("Mul", key, value))
        output = g.op("MatMul", g.reshape(q, 0, heads, 1, -1), present)  # [B, H, 1, V]
        return g.reshape(output, 0, 1, -1), present

    def retention_chunk(self, g: GraphBuilder, q: Value, k: Value, v: Value, past: Value, decay: ChunkDecay) -> Pair:
        """O = (Q K^T * D) V + (Q * xi) R, R' = (K * zeta)^T V + gamma^n R (Eq. 7, corrected), in float32.

        Of q, k `[B, T, H*K]`, k zero at padded tokens, v `[B, T, H*V]` and R `[B, H, K, V]`: O `[B, T, H*V]` and R'.
        """
        query, value = (
            g.op("Transpose", g.reshape(x, 0, 0, decay.heads, -1), perm=[0, 2, 1, 3])  # [B, H, T, K or V]
            for x in (q, v)
        )
        key = g.op("Transpose", g.reshape(k, 0, 0, decay.heads, -1), perm=[0, 2, 3, 1])  # [B, H, K, T]
        scores = g.op("Mul", g.op("MatMul", query, key), decay.matrix)
        inner = g.op("MatMul", scores, value)
        cross = g.op("MatMul", g.op("Mul", query, decay.xi), past)
        update = g.op("MatMul", g.op("Mul", key, decay.zeta), value)
        present = g.op("Add", update, g.op("Mul", past, decay.carried))
        output = g.op("Transpose", g.op("Add", inner, cross), perm=[0, 2, 1, 3])  # [B, T, H, V]
        return g.reshape(output, 0, 0, -1), present

    def retention_chunks(
        self, g: GraphBuilder, q: Value, k: Value, v: Value, past: Value, decay: ChunkDecay, chunks: Chunks
    ) -> Pair:
        """`retention_chunk` over one chunk after another in a Scan: time and memory linear in T.

        Args:
            chunks: how T is cut; zeta and carried of the decay have the chunks as their first axis.
        """

        def step(body: GraphBuilder, state: Value, chunk: list[Value]) -> Pair:
            query, key, value, zeta, carried = chunk
            terms = replace(decay, zeta=zeta, carried=carried)
            output, state = self.retention_chunk(body, query, key, value, state, terms)
            return state, output

        sequences = [*(chunks.split(g, x) for x in (q, k, v)), decay.zeta, decay.carried]
        present, outputs = scan(g, step, past, sequences)
        return chunks.join(g, outputs), present

    def retention_tokens(self, g: GraphBuilder, q: Value, k: Value, v: Value, past: Value, log_gamma: Value) -> Pair:
        """S_n = diag(gamma_n) S_(n-1) + k_n^T v_n, o_n = q_n S_n (Eq. 6), token by token in a Scan, in float32.

        For a gamma of each key dimension, `[B, T, H*K]`, 1 at padded tokens; other shapes as those of
        `retention_chunk`. As matrix products it would need gamma^(n-c) on q and gamma^(c-m) on k, and no c keeps both
        within float32 for every decay and chunk.
        """
        heads, _, _ = head_sizes(past)
        gamma = g.once("gamma_rows", lambda root: _time_first(root, root.op("Exp", log_gamma)))

        def step(body: GraphBuilder, state: Value, tokens: list[Value]) -> Pair:
            query, key, value, factor = tokens  # [B, H*K], [B, H*K], [B, H*V], [B, H*K]
            kept = body.op("Mul", state, body.reshape(factor, 0, heads, -1, 1))
            outer = body.op("Mul", body.reshape(key, 0, heads, -1, 1), body.reshape(value, 0, heads, 1, -1))
            state = body.op("Add", kept, outer)
            output = body.op("MatMul", body.reshape(query, 0, heads, 1, -1), state)  # [B, H, 1, V]
            return state, body.reshape(output, 0, -1)

        present, outputs = scan(g, step, past, [*(_time_first(g, x) for x in (q, k, v)), gamma])
        return _time_first(g, outputs), present


class LinearAttentionOps(StandardOps):
    """Retention as one LinearAttention a layer: of a step, and of tokens one by one.

    Chunks stay matrix products: the CPU kernel of LinearAttention walks token by token, and the CUDA kernel's shared
    memory does not hold RetNet's head sizes.
    """

    linear_attention_domain: ClassVar[str]

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
            domain=self.linear_attention_domain,
            outputs=2,
            update_rule="gated",
            scale=1.0,
            q_num_heads=heads,
            kv_num_heads=heads,
        )
        return output, present


class LaterStandardOps(LinearAttentionOps):
    """ai.onnx operators only, with its own LinearAttention."""

    opsets: ClassVar[Mapping[str, int]] = {"": LINEAR_ATTENTION_OPSET}
    linear_attention_domain = ""


class FusedOps(LinearAttentionOps):
    """The same fragments with ONNX Runtime's contrib operators where they are faster."""

    name = "fused"
    linear_attention_domain = MICROSOFT
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


OPERATOR_SETS: dict[str, StandardOps] = {ops.name: ops for ops in (StandardOps(), FusedOps())}
LATER_OPERATOR_SETS: tuple[StandardOps, ...] = (LaterStandardOps(),)
"""Sets of the same names in later opsets, for who asks for one."""


def head_sizes(past: Value) -> tuple[int, int, int]:
    """H, K and V of a state `[B, H, K, V]`."""
    assert past.shape is not None
    heads, head_k_dim, head_v_dim = (size for size in past.shape if isinstance(size, int))
    return heads, head_k_dim, head_v_dim


def given(value: Value | None) -> list[Value]:
    """An optional input at the end of a node's."""
    return [] if value is None else [value]


def _time_first(g: GraphBuilder, x: Value) -> Value:
    """`[B, T, N]` to `[T, B, N]`, and back."""
    return g.op("Transpose", x, perm=[1, 0, 2])


def _zero_points(matrix: BlockedMatrix) -> list[Value | None]:
    """As MatMulNBits and GatherBlockQuantized read them; none where they are the middle."""
    if matrix.format.symmetric:
        return []
    shape = (matrix.shape[0], matrix.format.type.packed_bytes(matrix.blocks))
    return [matrix.part("zero_points", "rows", "uint8", shape)]
