"""step.onnx, prefill.onnx and decoder.onnx: one token, a chunk of tokens, or either, to logits and new states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx_ir import Value

from retnet_tools.graph.builder import DecoderBuilder, TokenInputs
from retnet_tools.graph.contract import decoder_inputs, decoder_outputs, prefill_inputs
from retnet_tools.graph.decay import ChunkDecay, StepDecay, chunk_decay, log_decay
from retnet_tools.graph.nodes import GraphBuilder, Pair
from retnet_tools.weights import Array


@dataclass(frozen=True)
class ChunkTerms:
    """A chunk as layers read it.

    Attributes:
        tokens, position_ids, key_mask: as `TokenInputs`.
        last: the place of the last real token of each row, `[B, 1]` int64; 0 for a row of padding alone.
        decay: powers of gamma, or log(gamma) `[B, T, H*K]` of a model with one for each key dimension.
    """

    tokens: Value
    position_ids: Value
    key_mask: Value
    last: Value
    decay: ChunkDecay | Value

    @property
    def powers(self) -> tuple[Value, ...]:
        """The values of the decay."""
        decay = self.decay
        return (decay,) if isinstance(decay, Value) else (decay.matrix, decay.xi, decay.zeta, decay.carried)


class StepBuilder(DecoderBuilder):
    """o_n = q_n S_n with S_n = gamma S_(n-1) + k_n^T v_n in every layer (Eq. 6, 8, 9); T is 1."""

    name = "retnet_step"
    _decay: StepDecay

    def read(self, inputs: Sequence[Value]) -> TokenInputs:
        """Every token is real."""
        g = self.g
        tokens, position_ids, known = self.known(g, *inputs)
        self._decay = StepDecay(log_decay(self.config), position_ids)
        return tokens, position_ids, real_tokens(g, known)

    def token_axis(self, x: Value) -> Value:
        """One row is one sequence."""
        return self.g.op("Unsqueeze", x, self.g.integers(1))  # [B, N] -> [B, 1, N]

    def retention(self, q: Value, k: Value, v: Value, past: Value) -> Pair:
        """One step of the recurrence."""
        return self.ops.retention_step(self.g, q, k, v, past, self._decay)

    def last_rows(self, x: Value) -> Value:
        """The only row."""
        return x


class PrefillBuilder(DecoderBuilder):
    """Retention by chunks (Eq. 7, corrected) in every layer: matrix products over T tokens and a carried state.

    Padding is exact before and after the real tokens of a row: k is 0 there, and nothing else reads them; the decay
    counts real tokens alone. Ids and positions of padding are replaced by 0, so that they need not be valid. From the
    last layer's feed-forward on, only the last real token of each row is computed.

    A row whose real tokens have gaps, or positions that do not count up by one, gets NaN as its logits and states.

    A model with a gamma of each key dimension walks token by token in its retention
    (`StandardOps.retention_tokens`).
    """

    name = "retnet_prefill"
    input_specs = staticmethod(prefill_inputs)
    _step: StepDecay
    _decay: ChunkDecay | Value
    _shape: Value
    _length: Value
    _last: Value

    def read(self, inputs: Sequence[Value]) -> TokenInputs:
        """Padding is where attention_mask is 0."""
        self.measure(*inputs[1:])
        return self.take(self.blank_padding(self.g, *inputs))

    def measure(self, position_ids: Value, mask: Value) -> None:
        """Take the sizes of the chunk `[B, T]`."""
        self._step = StepDecay(log_decay(self.config), position_ids)
        self._shape = self.g.op("Concat", self.g.op("Shape", mask), self.g.integers(-1), axis=0)
        self._length = self.g.op("Gather", self._shape, self.g.int64("one", 1), axis=0)

    def take(self, terms: ChunkTerms) -> TokenInputs:
        """Keep what layers will need."""
        self._decay, self._last = terms.decay, terms.last
        return terms.tokens, terms.position_ids, terms.key_mask

    def blank_padding(self, g: GraphBuilder, tokens: Value, position_ids: Value, mask: Value) -> ChunkTerms:
        """Padding blanked, and what depends on the mask made once for all layers.

        Args:
            tokens: ids `[B, T]` or embeddings `[B, T, D]`.
            position_ids: `[B, T]`.
            mask: `[B, T]` int64: 1 at real tokens, which stand together, 0 elsewhere.
        """
        zero, one = g.int64("zero", 0), g.int64("one", 1)
        index = g.op("Range", zero, self._length, one)  # [T]
        ends = g.op("Where", g.op("Equal", mask, one), g.op("Add", index, one), zero)
        end = g.op("ReduceMax", ends, g.integers(1), keepdims=1)  # [B, 1]
        start = g.op("Sub", end, g.op("ReduceSum", mask, g.integers(1), keepdims=1))
        last = g.op("Max", g.op("Sub", end, one), zero)
        between = g.op("And", g.op("GreaterOrEqual", index, start), g.op("Less", index, end))
        real = g.cast(between, "bool", "int64")

        offsets = g.op("Sub", position_ids, index)
        offset = g.op("GatherElements", offsets, last, axis=1)  # [B, 1]
        in_order = g.op("Equal", g.op("Mul", g.op("Sub", offsets, offset), real), zero)
        position_ids = g.op("Mul", position_ids, real)
        column = g.op("Unsqueeze", between, g.integers(-1))  # [B, T] -> [B, T, 1]
        if self.config.has_vocabulary:
            tokens = g.op("Mul", tokens, real)
        else:
            tokens = g.op("Where", column, tokens, g.float32("blank", 0))
        tokens, position_ids, known = self.known(g, tokens, position_ids)

        right = g.op("And", g.op("And", g.op("Equal", mask, real), in_order), known)
        count = g.op("ReduceSum", g.cast(right, "bool", "int64"), g.integers(1), keepdims=1)
        whole = g.op("Unsqueeze", g.op("Equal", count, self._length), g.integers(-1))  # [B, 1, 1]
        key_mask = g.op("Where", whole, g.cast(column, "bool", "float32"), g.float32("nan", np.nan))
        decay: ChunkDecay | Value
        if self._step.log_gamma.ndim == 2:
            decay = g.op("Mul", self._step.rows(g), key_mask)
        else:
            decay = self.chunk_decay(g, self._step.log_gamma, start, end)
        return ChunkTerms(tokens, position_ids, key_mask, last, decay)

    def chunk_decay(self, g: GraphBuilder, log_gamma: Array, start: Value, end: Value) -> ChunkDecay:
        """Powers of gamma: all T tokens, of which those from `start` to `end` `[B, 1]` are real, are one chunk."""
        return chunk_decay(g, log_gamma, self._length, start, end)

    def token_axis(self, x: Value) -> Value:
        """Rows are the tokens of one sequence after another."""
        return self.g.op("Reshape", x, self._shape)  # [B*T, N] -> [B, T, N]

    def retention(self, q: Value, k: Value, v: Value, past: Value) -> Pair:
        """A chunk."""
        return self.retention_of_chunk(self.g, q, k, v, past)

    def retention_of_chunk(self, g: GraphBuilder, q: Value, k: Value, v: Value, past: Value) -> Pair:
        """By matrix products, or token by token where gamma belongs to the key dimension."""
        if isinstance(self._decay, Value):
            return self.ops.retention_tokens(g, q, k, v, past, self._decay)
        return self.ops.retention_chunk(g, q, k, v, past, self._decay)

    def last_rows(self, x: Value) -> Value:
        """The last real row of each sequence, and row 0 of one that is padding alone."""
        return self.g.op("GatherND", self.token_axis(x), self._last, batch_dims=1)  # [B*T, D] -> [B, D]


class AnyLengthBuilder(PrefillBuilder):
    """One token by the recurrence (Eq. 6), more by a chunk (Eq. 7), and logits wherever they are asked for.

    Products with weights stand outside the branches, so that a session packs each weight once for both. Which branch
    is taken depends on shapes alone, which are known on the CPU. So a single token is no padding: its row is NaN where
    attention_mask says so.
    """

    name = "retnet_decoder"
    input_specs = staticmethod(decoder_inputs)
    output_specs = staticmethod(decoder_outputs)
    _one_token: Value
    _indices: Value
    _logits_shape: Value

    def read(self, inputs: Sequence[Value]) -> TokenInputs:
        """A step needs nothing of what a chunk does."""
        g = self.g
        tokens, position_ids, mask, indices = inputs
        self.measure(position_ids, mask)
        self._indices = g.op("Unsqueeze", indices, g.integers(-1))  # [B, R] -> [B, R, 1]
        self._logits_shape = g.op("Concat", g.op("Shape", indices), g.integers(-1), axis=0)
        one = g.int64("one", 1)
        self._one_token = g.op("Equal", self._length, one)
        heads, by_key = self.config.num_heads, self._step.log_gamma.ndim == 2

        def step(body: GraphBuilder) -> tuple[Value, ...]:
            ids, positions, known = self.known(body, tokens, position_ids)
            real = body.op("And", known, body.op("Equal", mask, one))
            # What the outer graph makes of a chunk's powers, it makes of these too.
            nothing = body.constant("nothing", np.zeros((1, 1, 1), dtype=np.float32))
            return ids, positions, real_tokens(body, real), *[nothing] * (1 if by_key else 4)

        def chunk(body: GraphBuilder) -> tuple[Value, ...]:
            terms = self.blank_padding(body, tokens, position_ids, mask)
            return terms.tokens, terms.position_ids, terms.key_mask, *terms.powers

        integers = (0, 1) if self.config.has_vocabulary else (1,)
        tokens, position_ids, key_mask, *powers = g.branch(self._one_token, step, chunk, integers)
        self._decay = powers[0] if by_key else ChunkDecay(heads, *powers)
        return tokens, position_ids, key_mask

    def retention(self, q: Value, k: Value, v: Value, past: Value) -> Pair:
        """A step, or a chunk."""
        y, present = self.g.branch(
            self._one_token,
            lambda body: self.ops.retention_step(body, q, k, v, past, self._step),
            lambda body: self.retention_of_chunk(body, q, k, v, past),
        )
        return y, present

    def last_rows(self, x: Value) -> Value:
        """The rows of the places asked for: `[B*T, D]` to `[B*R, D]`."""
        rows = self.g.op("GatherND", self.token_axis(x), self._indices, batch_dims=1)  # [B, R, D]
        return self.g.reshape(rows, -1, self.config.hidden_size)

    def logits_axis(self, x: Value) -> Value:
        """`[B*R, N]` to `[B, R, N]`."""
        return self.g.op("Reshape", x, self._logits_shape)


def real_tokens(g: GraphBuilder, known: Value) -> Value:
    """The mask of keys `[B, T, 1]` where all tokens are real: NaN where an id or a position is not known."""
    mask = g.op("Where", known, g.float32("real", 1), g.float32("nan", np.nan))
    return g.op("Unsqueeze", mask, g.integers(-1))
