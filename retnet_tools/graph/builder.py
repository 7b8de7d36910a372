"""What the graphs of a decoder have in common: everything but the token axis and the form of retention.

Activations are `[rows, D]` with one row a token. Linear layers are `Gemm` with transB, which reads weights `[out, in]`
as checkpoints store them: nothing is transposed, merged projections are rows one after another, and a tied embedding
is stored once. Retention, rotation, decay and head norms are float32 whatever the weights' type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from retnet_tools.config import BlockNorm, RetNetConfig
from retnet_tools.graph.contract import (
    FLOAT16_STATE_LIMIT,
    MAX_POSITION,
    TensorSpec,
    state_scale,
    step_inputs,
    step_outputs,
)
from retnet_tools.graph.nodes import GraphBuilder, Pair, epsilon, graph_value, tensor_type
from retnet_tools.graph.ops import NormWeights, StandardOps
from retnet_tools.graph.positions import PositionValues, position_values
from retnet_tools.graph.weight_tensors import BuiltGraph, WeightTensor
from retnet_tools.weights import Array, canonical_shapes

WIDE = "float32"
TokenInputs = tuple[Value, Value, Value]
"""Ids `[B, T]` or embeddings `[B, T, D]`, positions `[B, T]`, and a mask of keys `[B, T, 1]` float32: 1 at real tokens,
0 at padding, NaN where nothing right can come out: it reaches the state and all that is read from it."""
Border = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]
"""The inputs and the outputs of a graph."""


class WeightedBuilder:
    """Nodes, and the stored tensors that they read.

    Args:
        shapes: of all weights, by canonical name.
        dtype: in which they are stored.
        ops: the operator set.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: str, ops: StandardOps) -> None:
        self.shapes, self.dtype, self.ops = shapes, dtype, ops
        self.g = GraphBuilder()
        self.stored: dict[str, WeightTensor] = {}

    def linear(self, x: Value, name: str, sources: tuple[str, ...], bias: bool) -> Value:
        """y = x W^T + b; several sources are merged along their outputs."""
        parts = ("weight", "bias") if bias else ("weight",)
        merged = (self.weight(f"{name}.{part}", *(f"{source}.{part}" for source in sources)) for part in parts)
        return self.g.op("Gemm", x, *merged, transB=1)

    def norm_weights(self, name: str, norm: BlockNorm) -> NormWeights:
        """The parameters of a norm."""
        return NormWeights(norm, self.weight(f"{name}.weight"), self.weight(f"{name}.bias") if norm.bias else None)

    def weight(self, name: str, *sources: str) -> Value:
        """One weight by its canonical name, or several merged under a name, rows one after another."""
        sources = sources or (name,)
        rows = sum(self.shapes[source][0] for source in sources)
        tensor = WeightTensor(name, self.dtype, (rows, *self.shapes[sources[0]][1:]), sources)
        return tensor.declared(self.g.initializers, self.stored)

    def table(self, name: str, table: Array) -> Value:
        """A computed table."""
        tensor = WeightTensor(name, table.dtype.name, table.shape, table=table)
        return tensor.declared(self.g.initializers, self.stored)

    def finish(self, name: str, inputs: list[Value], outputs: list[Value], border: Border) -> BuiltGraph:
        """The graph, its outputs named as its border says."""
        for value, spec in zip(outputs, border[1], strict=True):
            value.name, value.shape, value.type = spec.name, ir.Shape(spec.shape), tensor_type(spec.dtype)
        constants, opsets = list(self.g.initializers.values()), dict(self.ops.opsets)
        graph = ir.Graph(inputs, outputs, nodes=self.g.nodes, initializers=constants, opset_imports=opsets, name=name)
        return BuiltGraph(graph, *border, self.stored)


class DecoderBuilder(WeightedBuilder, ABC):
    """Builds one graph of a model.

    Args:
        config: the model.
        dtype: of weights and activations: float32, float16 or bfloat16.
        state_dtype: of the states at the graph's border.
        ops: the operator set.
    """

    name: ClassVar[str]
    input_specs = staticmethod(step_inputs)
    output_specs = staticmethod(step_outputs)

    def __init__(self, config: RetNetConfig, dtype: str, state_dtype: str, ops: StandardOps) -> None:
        super().__init__(canonical_shapes(config), dtype, ops)
        self.config, self.state_dtype = config, state_dtype

    @abstractmethod
    def read(self, inputs: Sequence[Value]) -> TokenInputs:
        """The inputs but for the states, ready for use."""

    @abstractmethod
    def token_axis(self, x: Value) -> Value:
        """`[rows, N]` to `[B, T, N]`."""

    @abstractmethod
    def retention(self, q: Value, k: Value, v: Value, past: Value) -> Pair:
        """Output `[B, T, H*V]` and state `[B, H, K, V]` of rotated q, k `[B, T, H*K]` and v `[B, T, H*V]`, float32."""

    @abstractmethod
    def last_rows(self, x: Value) -> Value:
        """`[rows, D]` to `[B, D]`: the row of the last real token of each sequence, or others that give logits."""

    def further_outputs(self) -> list[Value]:
        """Outputs after the states."""
        return []

    def known(self, g: GraphBuilder, tokens: Value, position_ids: Value) -> tuple[Value, Value, Value]:
        """Ids inside the vocabulary, positions inside the tables, and whether each token had both, `[B, T]` bool.

        -1 is the last row of a table to an ONNX lookup, and a quantized embedding takes any id. The CPU refuses to
        look up a position that is nowhere; CUDA checks no lookup, and there the row has to become NaN.
        """
        zero = g.int64("zero", 0)
        inside = g.op("Clip", position_ids, zero, g.int64("last_position", MAX_POSITION))
        known = g.op("Equal", position_ids, inside)
        if self.config.has_vocabulary:
            ids = g.op("Clip", tokens, zero, g.int64("last_id", self.config.vocab_size - 1))
            known, tokens = g.op("And", known, g.op("Equal", tokens, ids)), ids
        return tokens, g.op("Where", known, position_ids, g.int64("nowhere", 1 << 40)), known

    def build(self) -> BuiltGraph:
        """The graph, without weights."""
        specs = (self.input_specs(self.config, self.state_dtype), self.output_specs(self.config, self.state_dtype))
        inputs = [graph_value(spec) for spec in specs[0]]
        layers = self.config.num_layers
        self.g.scope = "inputs"
        tokens, position_ids, key_mask = self.read(inputs[:-layers])
        self.g.scope = "positions"
        terms = position_values(self.g, self.config, position_ids, self.table, key_mask)
        x, present = self._layers(self._embed(tokens), terms, inputs[-layers:])
        return self.finish(self.name, inputs, [self.logits(x), *present, *self.further_outputs()], specs)

    def _embed(self, tokens: Value) -> Value:
        g, config = self.g, self.config
        g.scope = "embedding"
        if config.has_vocabulary:
            x = g.op("Gather", self.weight("embedding.weight"), tokens, axis=0)
        else:
            x = g.cast(tokens, WIDE, self.dtype)
        x = g.reshape(x, -1, config.hidden_size)  # [B, T, D] -> [rows, D]
        x = g.scale(x, config.embedding_scale, self.dtype)
        return self.ops.norm(g, x, self._norm("embedding_norm")) if config.embedding_norm else x

    def _layers(self, x: Value, terms: PositionValues, past: Sequence[Value]) -> tuple[Value, list[Value]]:
        g, config, present = self.g, self.config, []
        pre = config.norm_order == "pre"
        # Pre-norm: Y = MSR(LN(X)) + X. Each sum is made together with the norm that follows it.
        normed = self.ops.norm(g, x, self._norm("layers.0.retention_norm")) if pre else x
        for i in range(config.num_layers):
            name, last = f"layers.{i}", i + 1 == config.num_layers
            g.scope = f"{name}/retention"
            y, state = self._retention(f"{name}.retention", normed, terms, past[i])
            present.append(state)
            if last:
                # Only states need the other tokens from here on.
                x, y = self.last_rows(x), self.last_rows(y)
            if config.parallel_residual:
                # The feed-forward network reads the input of the layer: LN_1 X as retention does, or LN_2 X.
                if config.shared_block_norm:
                    entry = self.last_rows(normed) if last else normed
                else:
                    entry = self.ops.norm(g, x, self._norm(f"{name}.ffn_norm"))
                x = g.op("Add", g.scale(x, config.residual_alpha, self.dtype), y)
            else:
                x = g.scale(x, config.residual_alpha, self.dtype)
                x, entry = self._add_norm(x, y, own=f"{name}.retention_norm", following=f"{name}.ffn_norm")
                x = g.scale(x, config.residual_alpha, self.dtype)
            g.scope = f"{name}/ffn"
            y = self._feed_forward(f"{name}.ffn", entry)
            following = "final_norm" if last else f"layers.{i + 1}.retention_norm"
            x, normed = self._add_norm(x, y, own=f"{name}.ffn_norm", following=following)
        if config.final_norm and not pre:
            normed = self.ops.norm(g, normed, self._norm("final_norm"))
        if config.output_norm is not None:
            normed = self.ops.norm(g, normed, self._norm("output_norm", config.output_norm))
        return normed, present

    def _add_norm(self, x: Value, y: Value, *, own: str, following: str) -> Pair:
        """The residual stream after a block gave y, and what the next block reads.

        Args:
            x: the stream before it times alpha, `[rows, D]`, as y.
            own, following: the norms of the block that gave y and of the next one (`final_norm` after the last).
        """
        order = self.config.norm_order
        if order == "branch":
            y = self.ops.norm(self.g, y, self._norm(own))
        if order == "branch" or (following == "final_norm" and order == "pre" and not self.config.final_norm):
            total = self.g.op("Add", x, y)
            return total, total
        total, normed = self.ops.add_norm(self.g, x, y, self._norm(following if order == "pre" else own))
        return (total, normed) if order == "pre" else (normed, normed)

    def _retention(self, name: str, x: Value, terms: PositionValues, past: Value) -> Pair:
        g, config = self.g, self.config
        parts = ("q_proj", "k_proj", "v_proj", "gate_proj")[: 3 if config.gate is None else 4]
        names = tuple(f"{name}.{part}" for part in parts)
        sizes = [self.shapes[f"{part}.weight"][0] for part in names]
        merged = self.linear(x, f"{name}.qkvg_proj", names, config.projection_bias)
        q, k, v, *gate = g.node("Split", merged, g.integers(*sizes), outputs=len(sizes), axis=-1)
        q, k, v = (self.token_axis(part) for part in (q, k, v))
        q, k = (self.ops.wide_features(g, config.feature_map, part, self.dtype) for part in (q, k))
        v = g.cast(v, self.dtype, WIDE)
        q = self._rotate(q, terms.cos, terms.sin, config.num_heads)
        k = self._repeat(self._rotate(k, terms.key_cos, terms.key_sin, config.num_kv_heads), config.head_k_dim)
        v = self._repeat(v, config.head_v_dim)
        if self.state_dtype == "float16":
            q, k, v = self._for_float16_states(q, k, v)
        state = g.cast(past, self.state_dtype, WIDE)
        state.shape, state.type = past.shape, tensor_type(WIDE)
        y, present = self.retention(q, k, v, state)
        y = self._head_norm(f"{name}.head_norm", y, terms)
        y = g.cast(g.reshape(y, -1, config.value_dim), WIDE, self.dtype)  # [B, T, H, V] -> [rows, H*V]
        if config.gate is not None:
            y = g.op("Mul", self.ops.activate(g, config.gate, gate[0]), y)
        y = self.linear(y, f"{name}.out_proj", (f"{name}.out_proj",), config.projection_bias)
        return y, g.cast(present, WIDE, self.state_dtype)

    def _for_float16_states(self, q: Value, k: Value, v: Value) -> tuple[Value, Value, Value]:
        """q / c, c k and v, so that the state is c S, with k and v limited; c is a power of two and rounds nothing."""
        g, limit = self.g, np.array(FLOAT16_STATE_LIMIT, dtype=np.float32)
        low, high = g.constant("state_limit_low", -limit), g.constant("state_limit_high", limit)
        scale = np.repeat(np.array(state_scale(self.config, self.state_dtype)), self.config.head_k_dim)
        k, v = (g.op("Clip", x, low, high) for x in (k, v))
        k = g.op("Mul", k, g.constant("state_scale", scale.astype(np.float32)))  # [H*K], as k
        return g.op("Mul", q, g.constant("state_scale_inverse", (1 / scale).astype(np.float32))), k, v

    def _rotate(self, x: Value, cos: Value, sin: Value, heads: int) -> Value:
        """q or k `[B, T, H*K]` by phases as `PositionValues` has them."""
        g, config = self.g, self.config
        if not config.has_head_rotation:
            return g.op("RotaryEmbedding", x, cos, sin, interleaved=1, num_heads=heads)
        # Heads lie one after another in a token, as tokens do: as tokens they may each have phases of their own, and a
        # head is as large as ever (CUDA's kernel takes 1024 at most).
        x = g.op("RotaryEmbedding", g.reshape(x, 0, -1, config.head_k_dim), cos, sin, interleaved=1, num_heads=1)
        return g.reshape(x, 0, -1, config.key_dim)  # [B, T*H, K] -> [B, T, H*K]

    def _repeat(self, x: Value, size: int) -> Value:
        """Each head of k or v once for every query head that shares it."""
        g, groups = self.g, self.config.num_kv_groups
        if groups == 1:
            return x
        x = g.reshape(x, 0, 0, -1, 1, size)  # [B, T, H*K] -> [B, T, H, 1, K]
        x = g.op("Expand", x, g.integers(1, 1, 1, groups, 1))
        return g.reshape(x, 0, 0, self.config.num_heads * size)

    def _head_norm(self, name: str, y: Value, terms: PositionValues) -> Value:
        g, config = self.g, self.config
        norm, heads, size = config.head_norm, config.num_heads, config.head_v_dim
        y = g.reshape(y, 0, 0, heads, size)  # [B, T, H*V] -> [B, T, H, V]
        if terms.score_scale is not None:
            y = g.op("Mul", y, terms.score_scale)
        if norm.kind == "none":
            return y
        ones = g.constant("head_norm.ones", np.ones(size, dtype=np.float32))
        operator = "RMSNormalization" if norm.kind == "rms" else "LayerNormalization"
        y = g.op(operator, y, ones, axis=-1, epsilon=epsilon(norm.eps))
        for part, op_type in (("weight", "Mul"), ("bias", "Add")):
            if f"{name}.{part}" in self.shapes:
                parameter = g.cast(self.weight(f"{name}.{part}"), self.dtype, WIDE)
                if norm.weight == "channel":
                    parameter = g.reshape(parameter, heads, size)
                y = g.op(op_type, y, parameter)
        return y

    def _feed_forward(self, name: str, x: Value) -> Value:
        g, ffn = self.g, self.config.feed_forward
        if ffn.kind == "glu":
            merged = self.linear(x, f"{name}.gate_up_proj", (f"{name}.gate_proj", f"{name}.up_proj"), ffn.bias)
            gate, up = g.node("Split", merged, g.integers(ffn.dim, ffn.dim), outputs=2, axis=-1)
            y = g.op("Mul", self.ops.activate(g, ffn.activation, gate), up)
        else:
            y = self.ops.activate(g, ffn.activation, self.linear(x, f"{name}.up_proj", (f"{name}.up_proj",), ffn.bias))
        if ffn.norm is not None:
            y = self.ops.norm(g, y, self._norm(f"{name}.norm", ffn.norm))
        return self.linear(y, f"{name}.down_proj", (f"{name}.down_proj",), ffn.bias)

    def logits(self, x: Value) -> Value:
        """Logits float32 of the rows that `last_rows` chose; without a head, the rows."""
        g = self.g
        g.scope = "lm_head"
        if self.config.has_vocabulary:
            name = "embedding.weight" if self.config.tie_word_embeddings else "lm_head.weight"
            bias = [self.weight("lm_head.bias")] if self.config.head_bias else []
            x = g.op("Gemm", x, self.weight(name), *bias, transB=1)
        return g.cast(self.logits_axis(x), self.dtype, WIDE)

    def logits_axis(self, x: Value) -> Value:
        """`[B, N]` to `[B, 1, N]`."""
        return self.g.op("Unsqueeze", x, self.g.integers(1))

    def _norm(self, name: str, norm: BlockNorm | None = None) -> NormWeights:
        return self.norm_weights(name, norm or self.config.block_norm)
