"""A Transformer decoder with a KV cache, to measure RetNet against: as many parameters, the same operators and files.

    transformer.onnx  input_ids [B,T], seqlens_k [B] int32 (position of each row's last token), total_sequence_length
                      int32, past_key_values.{i}.key and .value [B,G,N,D] -> logits [B,1,vocab] float32,
                      present.{i}.key and .value

N is the room of the cache; bound as past and present at once, it is written where it is read. T > 1 reads a prompt:
from an empty cache, or of one row. What is shared with RetNet is built by the same code: embedding, RMSNorm with the
residual sum, merged projections, GLU, output head of the last token; in the last layer only that token goes on after
attention.

Source of the comparison: Sun et al. 2023, section 3.4 and Figure 6, with rotary positions and GLU in place of the
paper's Transformer blocks, as RetNet's official code has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from retnet_tools.config import Activation, BlockNorm, RetNetConfig
from retnet_tools.errors import UsageError
from retnet_tools.graph.builder import WeightedBuilder
from retnet_tools.graph.contract import INPUT_IDS, LOGITS, TensorSpec
from retnet_tools.graph.nodes import ELEMENT_TYPES, GraphBuilder, graph_value
from retnet_tools.graph.ops import MICROSOFT, FusedOps
from retnet_tools.graph.weight_tensors import BuiltGraph
from retnet_tools.weights import Array, canonical_shapes

TRANSFORMER_FILE = "transformer.onnx"
SEQLENS = "seqlens_k"
TOTAL_LENGTH = "total_sequence_length"
ROTARY_BASE = 10000.0
MATCHED_WITHIN = 0.02
"""How far the number of parameters may be from RetNet's."""


@dataclass(frozen=True)
class TransformerConfig:
    """A pre-norm Transformer decoder with rotary positions and GLU, without biases.

    Attributes:
        num_kv_heads: heads of k and v, each shared by num_heads / num_kv_heads query heads.
        max_positions: rows of the rotary tables.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    activation: Activation
    norm_eps: float
    tie_word_embeddings: bool
    max_positions: int

    @property
    def head_size(self) -> int:
        """Size of a head of q, k and v (D)."""
        return self.hidden_size // self.num_heads

    def cache_shape(self, batch: int, room: int) -> tuple[int, int, int, int]:
        """Shape of the keys, and of the values, of one layer."""
        return (batch, self.num_kv_heads, room, self.head_size)


def cache_names(layer: int) -> tuple[tuple[str, str], ...]:
    """Names of what a layer reads and writes: of its keys, then of its values."""
    return tuple((f"past_key_values.{layer}.{part}", f"present.{layer}.{part}") for part in ("key", "value"))


def transformer_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Every weight by name, in storage order."""
    d, kv, f = config.hidden_size, config.num_kv_heads * config.head_size, config.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.vocab_size, d)}
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        shapes[f"{layer}.attention_norm.weight"] = (d,)
        for name, rows in (("q_proj", d), ("k_proj", kv), ("v_proj", kv), ("out_proj", d)):
            shapes[f"{layer}.attention.{name}.weight"] = (rows, d)
        shapes[f"{layer}.ffn_norm.weight"] = (d,)
        for name, size in (("gate_proj", (f, d)), ("up_proj", (f, d)), ("down_proj", (d, f))):
            shapes[f"{layer}.ffn.{name}.weight"] = size
    shapes["final_norm.weight"] = (d,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    return shapes


def parameters(shapes: dict[str, tuple[int, ...]]) -> int:
    """The number of parameters of weights of these shapes."""
    return sum(map(math.prod, shapes.values()))


def matching_transformer(config: RetNetConfig, *, kv_groups: int = 1, max_positions: int) -> TransformerConfig:
    """The Transformer of a RetNet's width, depth, vocabulary and number of parameters.

    Attention takes 4 d^2 parameters a layer where retention takes more, and the feed-forward network gets the rest: its
    inner size is chosen so that the totals agree, and rounded to whole blocks of 128 columns where it is large enough.
    Heads have 128 dimensions where the width holds 8 of them or more, else 64, 32 or 16.

    Args:
        kv_groups: query heads that share a head of k and v.

    Raises:
        UsageError: a RetNet that has no such match.
    """
    if not config.has_vocabulary:
        raise UsageError("a stack without embedding and head against a Transformer", "a model with a vocabulary")
    d = config.hidden_size
    if d % (16 * kv_groups):
        raise UsageError(f"a Transformer of width {d}", f"a multiple of {16 * kv_groups}", "measure without it")
    fitting = (size for size in (128, 64, 32) if d % (size * kv_groups) == 0 and d >= 8 * size)
    heads = d // next(fitting, 16)

    def sized(ffn_dim: int) -> TransformerConfig:
        return TransformerConfig(
            vocab_size=config.vocab_size,
            hidden_size=d,
            num_layers=config.num_layers,
            num_heads=heads,
            num_kv_heads=heads // kv_groups,
            ffn_dim=ffn_dim,
            activation=config.feed_forward.activation,
            norm_eps=config.block_norm.eps,
            tie_word_embeddings=config.tie_word_embeddings,
            max_positions=max_positions,
        )

    wanted = parameters(canonical_shapes(config))
    each = parameters(transformer_shapes(sized(2))) - parameters(transformer_shapes(sized(1)))
    exact = (wanted - parameters(transformer_shapes(sized(0)))) / each
    unit = 128 if exact >= 2048 else 8 if exact >= 256 else 1
    found = sized(max(unit, round(exact / unit) * unit))
    if abs(parameters(transformer_shapes(found)) / wanted - 1) > MATCHED_WITHIN:
        raise UsageError(
            f"no Transformer of width {d} and {config.num_layers} layers has {wanted} parameters within "
            f"{MATCHED_WITHIN:.0%}",
            "a RetNet of the usual proportions",
            "measure without it",
        )
    return found


def rotary_tables(config: TransformerConfig, dtype: str) -> dict[str, Array]:
    """cos and sin of n 10000^(-2i/D) for positions n, each `[max_positions, D/2]`, computed in float64."""
    half = config.head_size // 2
    angles = np.arange(config.max_positions)[:, None] * ROTARY_BASE ** (-np.arange(half) / half)
    kind = ELEMENT_TYPES[dtype].numpy()
    return {"positions.cos": np.cos(angles).astype(kind), "positions.sin": np.sin(angles).astype(kind)}


@dataclass(frozen=True)
class KeyValueCache:
    """The cache of one layer of a Transformer, as graph values.

    Attributes:
        keys, values: `[B, kv_heads, N, D]`, N at least the tokens of the longest row.
        last: position of the last new token of each row, `[B]` int32.
        total: of the longest row with the new tokens, an int32 scalar.
        cos, sin: of position times frequency, `[positions, D/2]`.
    """

    keys: ir.Value
    values: ir.Value
    last: ir.Value
    total: ir.Value
    cos: ir.Value
    sin: ir.Value


def cached_attention(
    g: GraphBuilder, qkv: ir.Value, cache: KeyValueCache, *, heads: int, kv_heads: int
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """GroupQueryAttention: causal softmax(Q K^T / sqrt(D)) V over a cache, q and k rotated by their positions.

    Args:
        qkv: `[B, T, (heads + 2 kv_heads) * D]`, the three projections side by side.

    Returns:
        Output `[B, T, heads * D]`, and keys and values `[B, kv_heads, N, D]` with the new tokens in them.
    """
    output, keys, values = g.node(
        "GroupQueryAttention",
        *(qkv, None, None, cache.keys, cache.values, cache.last, cache.total, cache.cos, cache.sin),
        domain=MICROSOFT,
        outputs=3,
        num_heads=heads,
        kv_num_heads=kv_heads,
        do_rotary=1,
    )
    return output, keys, values


class TransformerBuilder(WeightedBuilder):
    """X' = X + Attention(Norm(X)), X'' = X' + FFN(Norm(X')) in every layer.

    Args:
        config: the model.
        dtype: of weights, activations and the cache: float32, float16 or bfloat16.
    """

    def __init__(self, config: TransformerConfig, dtype: str) -> None:
        super().__init__(transformer_shapes(config), dtype, FusedOps())
        self.config = config

    def build(self) -> BuiltGraph:
        """The graph, without weights."""
        g, config, specs = self.g, self.config, self._border()
        inputs = [graph_value(spec) for spec in specs[0]]
        ids, last, total, *caches = inputs
        g.scope = "embedding"
        x = g.op("Gather", self.weight("embedding.weight"), ids, axis=0)
        x = g.reshape(x, -1, config.hidden_size)  # [B, T, D] -> [rows, D]
        shape = g.op("Concat", g.op("Shape", ids), g.integers(-1), axis=0)
        cos, sin = (self.table(name, table) for name, table in rotary_tables(config, self.dtype).items())
        normed, present = self._norm(x, "layers.0.attention_norm"), []
        for i in range(config.num_layers):
            name = f"layers.{i}"
            g.scope = f"{name}/attention"
            cache = KeyValueCache(caches[2 * i], caches[2 * i + 1], last, total, cos, sin)
            y, keys, values = self._attention(f"{name}.attention", normed, shape, cache)
            present += [keys, values]
            if i + 1 == config.num_layers:
                x, y = self._last_row(x, shape), self._last_row(y, shape)
            x, normed = self._add_norm(x, y, f"{name}.ffn_norm")
            g.scope = f"{name}/ffn"
            y = self._feed_forward(f"{name}.ffn", normed)
            following = "final_norm" if i + 1 == config.num_layers else f"layers.{i + 1}.attention_norm"
            x, normed = self._add_norm(x, y, following)
        g.scope = "lm_head"
        head = "embedding.weight" if config.tie_word_embeddings else "lm_head.weight"
        logits = g.op("Gemm", normed, self.weight(head), transB=1)
        logits = g.cast(g.op("Unsqueeze", logits, g.integers(1)), self.dtype, "float32")
        return self.finish("transformer", inputs, [logits, *present], specs)

    def _attention(
        self, name: str, x: ir.Value, shape: ir.Value, cache: KeyValueCache
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        g, config = self.g, self.config
        merged = self.linear(x, f"{name}.qkv_proj", tuple(f"{name}.{p}_proj" for p in "qkv"), bias=False)
        merged = g.op("Reshape", merged, shape)  # [rows, N] -> [B, T, N]
        y, keys, values = cached_attention(g, merged, cache, heads=config.num_heads, kv_heads=config.num_kv_heads)
        y = g.reshape(y, -1, config.hidden_size)  # [B, T, D] -> [rows, D]
        return self.linear(y, f"{name}.out_proj", (f"{name}.out_proj",), bias=False), keys, values

    def _feed_forward(self, name: str, x: ir.Value) -> ir.Value:
        g, dim = self.g, self.config.ffn_dim
        merged = self.linear(x, f"{name}.gate_up_proj", (f"{name}.gate_proj", f"{name}.up_proj"), bias=False)
        gate, up = g.node("Split", merged, g.integers(dim, dim), outputs=2, axis=-1)
        y = g.op("Mul", self.ops.activate(g, self.config.activation, gate), up)
        return self.linear(y, f"{name}.down_proj", (f"{name}.down_proj",), bias=False)

    def _last_row(self, x: ir.Value, shape: ir.Value) -> ir.Value:
        last = self.g.constant("last", np.array(-1, dtype=np.int64))
        return self.g.op("Gather", self.g.op("Reshape", x, shape), last, axis=1)  # [rows, D] -> [B, D]

    def _norm(self, x: ir.Value, name: str) -> ir.Value:
        return self.ops.norm(self.g, x, self.norm_weights(name, self._kind))

    def _add_norm(self, x: ir.Value, y: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        return self.ops.add_norm(self.g, x, y, self.norm_weights(name, self._kind))

    @property
    def _kind(self) -> BlockNorm:
        return BlockNorm("rms", self.config.norm_eps)

    def _border(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        config = self.config
        shape = ("batch", config.num_kv_heads, "room", config.head_size)
        names = [pair for i in range(config.num_layers) for pair in cache_names(i)]
        inputs = (
            TensorSpec(INPUT_IDS, "int64", ("batch", "tokens")),
            TensorSpec(SEQLENS, "int32", ("batch",)),
            TensorSpec(TOTAL_LENGTH, "int32", ()),
            *(TensorSpec(past, self.dtype, shape) for past, _ in names),
        )
        logits = TensorSpec(LOGITS, "float32", ("batch", 1, config.vocab_size))
        return inputs, (logits, *(TensorSpec(present, self.dtype, shape) for _, present in names))
