"""The operators that graphs are built from, in two sets: `standard` (ai.onnx only) and `fused` (with com.microsoft).

This is the only file that names com.microsoft operators. Both sets have the same methods, so that the builder does not
know which one it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from retnet_tools.config import Activation, BlockNorm
from retnet_tools.weights import Array

OPSET = 23
"""The first ai.onnx opset with RMSNormalization and RotaryEmbedding; ONNX Runtime runs both on CPU and CUDA."""
MICROSOFT = "com.microsoft"

_ACTIVATION_OPS: dict[Activation, str] = {
    "gelu": "Gelu",
    "relu": "Relu",
    "leaky_relu": "LeakyRelu",
    "elu": "Elu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
}
ELEMENT_TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
}


@dataclass(frozen=True)
class NormWeights:
    """The parameters of a block norm as graph values."""

    norm: BlockNorm
    weight: ir.Value
    bias: ir.Value | None


@dataclass(frozen=True)
class StepDecay:
    """log(gamma) `[H]` or `[H, K]`, and the graph's position_ids `[B, 1]`, which tell operators the batch size."""

    log_gamma: Array
    position_ids: ir.Value


class GraphBuilder:
    """Collects nodes and small constants; each node is named after the scope it was made in."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.scope = ""
        self._names: dict[str, int] = {}
        self._shared: dict[str, ir.Value] = {}

    def node(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", outputs: int = 1, **attributes: Any
    ) -> list[ir.Value]:
        """Append a node; returns its outputs."""
        name = self._unique(f"{self.scope}/{op_type}")
        node = ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = f"{name}:{i}" if outputs > 1 else f"{name}:out"
        self.nodes.append(node)
        return list(node.outputs)

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Append a node with one output."""
        return self.node(op_type, *inputs, domain=domain, **attributes)[0]

    def constant(self, name: str, array: Array) -> ir.Value:
        """A small constant, stored in the graph itself, once for each name."""
        if name not in self.initializers:
            tensor = ir.tensor(array, name=name)
            self.initializers[name] = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self.initializers[name]

    def integers(self, *values: int) -> ir.Value:
        """A vector of int64, for shapes and axes."""
        return self.constant("ints_" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """Reshape to a constant shape, with 0 (keep) and -1 (infer)."""
        return self.op("Reshape", x, self.integers(*shape))

    def cast(self, x: ir.Value, source: str, target: str) -> ir.Value:
        """Cast, or the value itself where the types agree already."""
        return x if source == target else self.op("Cast", x, to=ELEMENT_TYPES[target])

    def once(self, key: str, make: Callable[[], ir.Value]) -> ir.Value:
        """A value that the whole graph shares: made on first use."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def _unique(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return f"{name}_{count}" if count else name


class StandardOps:
    """Graph fragments of ai.onnx operators only."""

    name = "standard"
    opsets: ClassVar[Mapping[str, int]] = {"": OPSET}

    def activate(self, g: GraphBuilder, activation: Activation, x: ir.Value) -> ir.Value:
        """Any activation of the configuration."""
        if activation == "silu":
            return g.op("Mul", x, g.op("Sigmoid", x))
        if activation == "relu2":
            y = g.op("Relu", x)
            return g.op("Mul", y, y)
        if activation == "gelu_tanh":
            return g.op("Gelu", x, approximate="tanh")
        return g.op(_ACTIVATION_OPS[activation], x)

    def norm(self, g: GraphBuilder, x: ir.Value, weights: NormWeights) -> ir.Value:
        """RMSNorm or LayerNorm over the last dimension, accumulated in float32."""
        if weights.norm.kind == "rms":
            y = g.op("RMSNormalization", x, weights.weight, axis=-1, epsilon=weights.norm.eps)
            return y if weights.bias is None else g.op("Add", y, weights.bias)
        inputs = [x, weights.weight] + ([weights.bias] if weights.bias is not None else [])
        return g.op("LayerNormalization", *inputs, axis=-1, epsilon=weights.norm.eps)

    def add_norm(self, g: GraphBuilder, x: ir.Value, y: ir.Value, weights: NormWeights) -> tuple[ir.Value, ir.Value]:
        """x + y, and the norm of it, for `[rows, D]`."""
        total = g.op("Add", x, y)
        return total, self.norm(g, total, weights)

    def retention_step(
        self, g: GraphBuilder, q: ir.Value, k: ir.Value, v: ir.Value, past: ir.Value, decay: StepDecay
    ) -> tuple[ir.Value, ir.Value]:
        """S_n = gamma S_(n-1) + k_n^T v_n, o_n = q_n S_n (Eq. 6) for one token, in float32.

        Args:
            q, k: `[B, 1, H*K]`; v: `[B, 1, H*V]`; past: `[B, H, K, V]`.

        Returns:
            o `[B, 1, H*V]` and S_n `[B, H, K, V]`.
        """
        heads = len(decay.log_gamma)
        gamma = g.constant("gamma", np.exp(decay.log_gamma).astype(np.float32).reshape(1, heads, -1, 1))
        key = g.op("Reshape", k, g.integers(0, heads, -1, 1))  # [B, H, K, 1]
        value = g.op("Reshape", v, g.integers(0, heads, 1, -1))  # [B, H, 1, V]
        present = g.op("Add", g.op("Mul", past, gamma), g.op("Mul", key, value))
        output = g.op("MatMul", g.op("Reshape", q, g.integers(0, heads, 1, -1)), present)  # [B, H, 1, V]
        return g.op("Reshape", output, g.integers(0, 1, -1)), present


class FusedOps(StandardOps):
    """The same fragments with ONNX Runtime's contrib operators where they fuse several nodes into one."""

    name = "fused"
    opsets: ClassVar[Mapping[str, int]] = {"": OPSET, MICROSOFT: 1}

    def activate(self, g: GraphBuilder, activation: Activation, x: ir.Value) -> ir.Value:
        """Silu is QuickGelu with alpha 1."""
        if activation == "silu":
            return g.op("QuickGelu", x, domain=MICROSOFT, alpha=1.0)
        return super().activate(g, activation, x)

    def add_norm(self, g: GraphBuilder, x: ir.Value, y: ir.Value, weights: NormWeights) -> tuple[ir.Value, ir.Value]:
        """Skip(Simplified)LayerNormalization: norm and sum in one node."""
        if weights.norm.kind == "rms" and weights.bias is not None:
            return super().add_norm(g, x, y, weights)
        name = {"rms": "SkipSimplifiedLayerNormalization", "layer": "SkipLayerNormalization"}[weights.norm.kind]
        inputs = [x, y, weights.weight] + ([weights.bias] if weights.bias is not None else [])
        normed, mean, deviation, total = g.node(name, *inputs, domain=MICROSOFT, outputs=4, epsilon=weights.norm.eps)
        mean.name = deviation.name = ""
        return total, normed

    def retention_step(
        self, g: GraphBuilder, q: ir.Value, k: ir.Value, v: ir.Value, past: ir.Value, decay: StepDecay
    ) -> tuple[ir.Value, ir.Value]:
        """LinearAttention with the `gated` update: S = exp(decay) S + k (x) v, o = q S."""
        heads = len(decay.log_gamma)

        def log_gamma_rows() -> ir.Value:
            # The kernel indexes decay by batch and time, so it must really be [B, 1, H] or [B, 1, H*K].
            table = g.constant("log_gamma", decay.log_gamma.astype(np.float32).reshape(1, -1))
            zeros = g.op("Sub", decay.position_ids, decay.position_ids)
            return g.op("Gather", table, zeros, axis=0)

        output, present = g.node(
            "LinearAttention",
            *(q, k, v, past, g.once("log_gamma_rows", log_gamma_rows)),
            domain=MICROSOFT,
            outputs=2,
            update_rule="gated",
            scale=1.0,
            q_num_heads=heads,
            kv_num_heads=heads,
        )
        return output, present


OPERATOR_SETS: dict[str, StandardOps] = {ops.name: ops for ops in (StandardOps(), FusedOps())}
