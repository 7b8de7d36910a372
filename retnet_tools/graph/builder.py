"""Builds the step graph: one token in, logits and new states out.

Activations are `[rows, D]` with one row a token. Linear layers are `Gemm` with transB, which reads weights `[out, in]`
as checkpoints store them: nothing is transposed, merged projections are rows one after another, and a tied embedding
is stored once. Retention, rotation, decay and head norms are float32 whatever the weights' type.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from retnet_tools.config import BlockNorm, RetNetConfig
from retnet_tools.graph import contract
from retnet_tools.graph.ops import ELEMENT_TYPES, GraphBuilder, NormWeights, StandardOps, StepDecay
from retnet_tools.graph.tables import decay_sum_tables, log_decay, phase_tables
from retnet_tools.weights import Array, canonical_shapes

WIDE = "float32"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of weights.data: canonical tensors one after another along the first axis, or a computed table.

    Attributes:
        sources: canonical names; empty for a table.
        table: the data of a table.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    table: Array | None = None


@dataclass(frozen=True)
class BuiltGraph:
    """A graph and the tensors that it expects in weights.data."""

    graph: ir.Graph
    stored: dict[str, StoredTensor]


def build_step(config: RetNetConfig, *, dtype: str, state_dtype: str, ops: StandardOps) -> BuiltGraph:
    """The step graph of a model: o_n = q_n S_n with S_n = gamma S_(n-1) + k_n^T v_n in every layer (Eq. 6, 8, 9).

    Args:
        config: the model.
        dtype: of weights and activations: float32, float16 or bfloat16.
        state_dtype: of the states at the graph's border.
        ops: the operator set.
    """
    return _StepBuilder(config, dtype, state_dtype, ops).build()


@dataclass(frozen=True)
class _PositionTerms:
    cos: ir.Value
    sin: ir.Value
    key_cos: ir.Value
    key_sin: ir.Value
    score_scale: ir.Value | None


class _StepBuilder:
    def __init__(self, config: RetNetConfig, dtype: str, state_dtype: str, ops: StandardOps) -> None:
        self.config, self.dtype, self.state_dtype, self.ops = config, dtype, state_dtype, ops
        self.g = GraphBuilder()
        self.shapes = canonical_shapes(config)
        self.stored: dict[str, StoredTensor] = {}

    def build(self) -> BuiltGraph:
        inputs = [_graph_value(spec) for spec in contract.step_inputs(self.config, self.state_dtype)]
        tokens, position_ids, *past = inputs
        terms = self._position_terms(position_ids)
        decay = StepDecay(log_decay(self.config), position_ids)
        x, present = self._layers(self._embed(tokens), terms, decay, past)
        outputs = [self._logits(x), *present]
        for value, spec in zip(outputs, contract.step_outputs(self.config, self.state_dtype), strict=True):
            value.name, value.shape, value.type = spec.name, ir.Shape(spec.shape), _tensor_type(spec.dtype)
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self.g.nodes,
            initializers=list(self.g.initializers.values()),
            opset_imports=dict(self.ops.opsets),
            name="retnet_step",
        )
        return BuiltGraph(graph, self.stored)

    def _embed(self, tokens: ir.Value) -> ir.Value:
        g, config = self.g, self.config
        g.scope = "embedding"
        if config.has_vocabulary:
            x = g.op("Gather", self._weight("embedding.weight"), tokens, axis=0)
        else:
            x = g.cast(tokens, WIDE, self.dtype)
        x = g.reshape(x, -1, config.hidden_size)  # [B, T, D] -> [rows, D]
        x = self._scale(x, config.embedding_scale)
        return self.ops.norm(g, x, self._norm("embedding_norm")) if config.embedding_norm else x

    def _layers(
        self, x: ir.Value, terms: _PositionTerms, decay: StepDecay, past: list[ir.Value]
    ) -> tuple[ir.Value, list[ir.Value]]:
        config, present = self.config, []
        pre = config.norm_order == "pre"
        # Pre-norm: Y = MSR(LN(X)) + X. Each sum is made together with the norm that follows it.
        normed = self.ops.norm(self.g, x, self._norm("layers.0.retention_norm")) if pre else x
        for i in range(config.num_layers):
            self.g.scope = f"layers.{i}/retention"
            y, state = self._retention(f"layers.{i}.retention", normed, terms, decay, past[i])
            present.append(state)
            x, normed = self._add_norm(x, y, own=f"layers.{i}.retention_norm", following=f"layers.{i}.ffn_norm")
            self.g.scope = f"layers.{i}/ffn"
            y = self._feed_forward(f"layers.{i}.ffn", normed)
            following = "final_norm" if i + 1 == config.num_layers else f"layers.{i + 1}.retention_norm"
            x, normed = self._add_norm(x, y, own=f"layers.{i}.ffn_norm", following=following)
        if config.final_norm and not pre:
            normed = self.ops.norm(self.g, normed, self._norm("final_norm"))
        return normed, present

    def _add_norm(self, x: ir.Value, y: ir.Value, *, own: str, following: str) -> tuple[ir.Value, ir.Value]:
        """The residual stream after a block gave y, and what the next block reads.

        Args:
            x, y: `[rows, D]`.
            own: the norm of the block that gave y.
            following: the norm of the next block, or `final_norm`.
        """
        order, x = self.config.norm_order, self._scale(x, self.config.residual_alpha)
        if order == "branch":
            y = self.ops.norm(self.g, y, self._norm(own))
        if order == "branch" or (following == "final_norm" and order == "pre" and not self.config.final_norm):
            total = self.g.op("Add", x, y)
            return total, total
        total, normed = self.ops.add_norm(self.g, x, y, self._norm(following if order == "pre" else own))
        return (total, normed) if order == "pre" else (normed, normed)

    def _retention(
        self, name: str, x: ir.Value, terms: _PositionTerms, decay: StepDecay, past: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        g, config = self.g, self.config
        parts = ("q_proj", "k_proj", "v_proj", "gate_proj")[: 3 if config.gate is None else 4]
        names = tuple(f"{name}.{part}" for part in parts)
        sizes = [self.shapes[f"{part}.weight"][0] for part in names]
        merged = self._linear(x, f"{name}.qkvg_proj", names, config.projection_bias)
        q, k, v, *gate = g.node("Split", merged, g.integers(*sizes), outputs=len(sizes), axis=-1)
        if config.feature_map is not None:
            q, k = (self.ops.activate(g, config.feature_map, part) for part in (q, k))
        q, k, v = (self._tokens(part) for part in (q, k, v))
        q = self._rotate(q, terms.cos, terms.sin, config.num_heads)
        k = self._repeat(self._rotate(k, terms.key_cos, terms.key_sin, config.num_kv_heads), config.head_k_dim)
        v = self._repeat(v, config.head_v_dim)
        y, present = self.ops.retention_step(g, q, k, v, g.cast(past, self.state_dtype, WIDE), decay)
        y = self._head_norm(f"{name}.head_norm", y, terms)
        y = g.cast(g.reshape(y, -1, config.value_dim), WIDE, self.dtype)  # [B, 1, H, V] -> [rows, H*V]
        if config.gate is not None:
            y = g.op("Mul", self.ops.activate(g, config.gate, gate[0]), y)
        y = self._linear(y, f"{name}.out_proj", (f"{name}.out_proj",), config.projection_bias)
        return y, g.cast(present, WIDE, self.state_dtype)

    def _tokens(self, x: ir.Value) -> ir.Value:
        x = self.g.op("Unsqueeze", x, self.g.integers(1))  # [rows, N] -> [B, 1, N]
        return self.g.cast(x, self.dtype, WIDE)

    def _rotate(self, x: ir.Value, cos: ir.Value, sin: ir.Value, heads: int) -> ir.Value:
        return self.g.op("RotaryEmbedding", x, cos, sin, interleaved=1, num_heads=heads)

    def _repeat(self, x: ir.Value, size: int) -> ir.Value:
        """Each head of k or v once for every query head that shares it."""
        g, groups = self.g, self.config.num_kv_groups
        if groups == 1:
            return x
        x = g.reshape(x, 0, 0, -1, 1, size)  # [B, 1, H*K] -> [B, 1, H, 1, K]
        x = g.op("Expand", x, g.integers(1, 1, 1, groups, 1))
        return g.reshape(x, 0, 0, self.config.num_heads * size)

    def _head_norm(self, name: str, y: ir.Value, terms: _PositionTerms) -> ir.Value:
        g, config = self.g, self.config
        norm, heads, size = config.head_norm, config.num_heads, config.head_v_dim
        y = g.reshape(y, 0, 0, heads, size)  # [B, 1, H*V] -> [B, 1, H, V]
        if terms.score_scale is not None:
            y = g.op("Mul", y, terms.score_scale)
        if norm.kind == "none":
            return y
        ones = g.constant("head_norm.ones", np.ones(size, dtype=np.float32))
        if norm.kind == "rms":
            y = g.op("RMSNormalization", y, ones, axis=-1, epsilon=norm.eps)
        else:
            y = g.op("LayerNormalization", y, ones, axis=-1, epsilon=norm.eps)
        for part, op_type in (("weight", "Mul"), ("bias", "Add")):
            if f"{name}.{part}" in self.shapes:
                parameter = g.cast(self._weight(f"{name}.{part}"), self.dtype, WIDE)
                if norm.weight == "channel":
                    parameter = g.reshape(parameter, heads, size)
                y = g.op(op_type, y, parameter)
        return y

    def _feed_forward(self, name: str, x: ir.Value) -> ir.Value:
        g, ffn = self.g, self.config.feed_forward
        if ffn.kind == "glu":
            merged = self._linear(x, f"{name}.gate_up_proj", (f"{name}.gate_proj", f"{name}.up_proj"), ffn.bias)
            gate, up = g.node("Split", merged, g.integers(ffn.dim, ffn.dim), outputs=2, axis=-1)
            y = g.op("Mul", self.ops.activate(g, ffn.activation, gate), up)
        else:
            y = self.ops.activate(g, ffn.activation, self._linear(x, f"{name}.up_proj", (f"{name}.up_proj",), ffn.bias))
        if ffn.norm is not None:
            y = self.ops.norm(g, y, self._norm(f"{name}.norm", ffn.norm))
        return self._linear(y, f"{name}.down_proj", (f"{name}.down_proj",), ffn.bias)

    def _logits(self, x: ir.Value) -> ir.Value:
        g = self.g
        g.scope = "lm_head"
        if self.config.has_vocabulary:
            name = "embedding.weight" if self.config.tie_word_embeddings else "lm_head.weight"
            bias = [self._weight("lm_head.bias")] if self.config.head_bias else []
            x = g.op("Gemm", x, self._weight(name), *bias, transB=1)
        return g.cast(g.op("Unsqueeze", x, g.integers(1)), self.dtype, WIDE)  # [rows, vocab] -> [B, 1, vocab]

    def _position_terms(self, position_ids: ir.Value) -> _PositionTerms:
        g, config = self.g, self.config
        g.scope = "positions"
        radix = g.constant("position_radix", np.array(contract.POSITION_RADIX, dtype=np.int64))
        high = g.op("Div", position_ids, radix)
        low = g.op("Sub", position_ids, g.op("Mul", high, radix))

        def lookup(tables: dict[str, Array], name: str) -> ir.Value:
            return g.op("Gather", self._table(name, tables[name]), high if name.endswith("high") else low, axis=0)

        phases = phase_tables(config)
        cos_l, sin_l, cos_h, sin_h = (
            lookup(phases, f"positions.{f}_{p}") for p in ("low", "high") for f in ("cos", "sin")
        )
        cos = g.op("Sub", g.op("Mul", cos_h, cos_l), g.op("Mul", sin_h, sin_l))
        sin = g.op("Add", g.op("Mul", sin_h, cos_l), g.op("Mul", cos_h, sin_l))
        # The scale of k rides on its rotation: one product for the whole graph, exact in every weight type.
        key_cos, key_sin = (self._scale(x, config.score_normalization.key_scale, WIDE) for x in (cos, sin))
        if not config.score_normalization.by_decay:
            return _PositionTerms(cos, sin, key_cos, key_sin, None)
        sums = decay_sum_tables(config)
        carried = g.op("Mul", lookup(sums, "positions.decay_power_low"), lookup(sums, "positions.decay_sum_high"))
        root = g.op("Sqrt", g.op("Add", lookup(sums, "positions.decay_sum_low"), carried))
        scale = g.op("Unsqueeze", g.op("Reciprocal", root), g.integers(-1))  # [B, 1, H] -> [B, 1, H, 1]
        return _PositionTerms(cos, sin, key_cos, key_sin, scale)

    def _linear(self, x: ir.Value, name: str, sources: tuple[str, ...], bias: bool) -> ir.Value:
        """y = x W^T + b; several sources are merged along their outputs."""
        inputs = [x, self._merged(f"{name}.weight", tuple(f"{s}.weight" for s in sources))]
        if bias:
            inputs.append(self._merged(f"{name}.bias", tuple(f"{s}.bias" for s in sources)))
        return self.g.op("Gemm", *inputs, transB=1)

    def _norm(self, name: str, norm: BlockNorm | None = None) -> NormWeights:
        norm = norm or self.config.block_norm
        return NormWeights(norm, self._weight(f"{name}.weight"), self._weight(f"{name}.bias") if norm.bias else None)

    def _scale(self, x: ir.Value, factor: float, dtype: str | None = None) -> ir.Value:
        if factor == 1.0:
            return x
        dtype = dtype or self.dtype
        return self.g.op(
            "Mul",
            x,
            self.g.constant(f"scale_{factor!r}_{dtype}", np.array(factor).astype(ELEMENT_TYPES[dtype].numpy())),
        )

    def _weight(self, name: str) -> ir.Value:
        return self._merged(name, (name,))

    def _merged(self, name: str, sources: tuple[str, ...]) -> ir.Value:
        rows = sum(self.shapes[source][0] for source in sources)
        return self._declare(StoredTensor(name, self.dtype, (rows, *self.shapes[sources[0]][1:]), sources))

    def _table(self, name: str, table: Array) -> ir.Value:
        return self._declare(StoredTensor(name, table.dtype.name, table.shape, table=table))

    def _declare(self, tensor: StoredTensor) -> ir.Value:
        if tensor.name not in self.stored:
            self.stored[tensor.name] = tensor
            self.g.initializers[tensor.name] = ir.Value(
                name=tensor.name, shape=ir.Shape(tensor.shape), type=_tensor_type(tensor.dtype)
            )
        return self.g.initializers[tensor.name]


def _graph_value(spec: contract.TensorSpec) -> ir.Value:
    return ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=_tensor_type(spec.dtype))


def _tensor_type(dtype: str) -> ir.TensorType:
    return ir.TensorType(ELEMENT_TYPES[dtype])
