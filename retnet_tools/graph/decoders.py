"""step.onnx and prefill.onnx: one token, or a chunk of tokens, to logits of the last one and new states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx_ir import Value

from retnet_tools.graph.builder import DecoderBuilder, TokenInputs
from retnet_tools.graph.contract import prefill_inputs
from retnet_tools.graph.decay import ChunkDecay, StepDecay, chunk_decay, log_decay
from retnet_tools.graph.nodes import Pair
from retnet_tools.weights import Array


class StepBuilder(DecoderBuilder):
    """o_n = q_n S_n with S_n = gamma S_(n-1) + k_n^T v_n in every layer (Eq. 6, 8, 9); T is 1."""

    name = "retnet_step"
    _decay: StepDecay

    def read(self, inputs: Sequence[Value]) -> TokenInputs:
        """Every token is real."""
        g = self.g
        tokens, position_ids, known = self.known(*inputs)
        self._decay = StepDecay(log_decay(self.config), position_ids)
        key_mask = g.op("Where", known, g.float32("real", 1), g.float32("nan", np.nan))
        return tokens, position_ids, g.op("Unsqueeze", key_mask, g.integers(-1))

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
    _decay: ChunkDecay | Value
    _shape: Value
    _length: Value
    _last: Value

    def read(self, inputs: Sequence[Value]) -> TokenInputs:
        """Padding is where attention_mask is 0."""
        return self.blank_padding(*inputs)

    def blank_padding(self, tokens: Value, position_ids: Value, mask: Value) -> TokenInputs:
        """Padding blanked, and what depends on the mask made once for all layers.

        Args:
            tokens: ids `[B, T]` or embeddings `[B, T, D]`.
            position_ids: `[B, T]`.
            mask: `[B, T]` int64: 1 at real tokens, which stand together, 0 elsewhere.
        """
        g, zero, one = self.g, self.g.int64("zero", 0), self.g.int64("one", 1)
        self._shape = g.op("Concat", g.op("Shape", mask), g.integers(-1), axis=0)
        self._length = g.op("Gather", self._shape, one, axis=0)
        index = g.op("Range", zero, self._length, one)  # [T]
        ends = g.op("Where", g.op("Equal", mask, one), g.op("Add", index, one), zero)
        end = g.op("ReduceMax", ends, g.integers(1), keepdims=1)  # [B, 1]
        start = g.op("Sub", end, g.op("ReduceSum", mask, g.integers(1), keepdims=1))
        self._last = g.op("Max", g.op("Sub", end, one), zero)
        between = g.op("And", g.op("GreaterOrEqual", index, start), g.op("Less", index, end))
        real = g.cast(between, "bool", "int64")

        offsets = g.op("Sub", position_ids, index)
        offset = g.op("GatherElements", offsets, self._last, axis=1)  # [B, 1]
        in_order = g.op("Equal", g.op("Mul", g.op("Sub", offsets, offset), real), zero)
        position_ids = g.op("Mul", position_ids, real)
        column = g.op("Unsqueeze", between, g.integers(-1))  # [B, T] -> [B, T, 1]
        if self.config.has_vocabulary:
            tokens = g.op("Mul", tokens, real)
        else:
            tokens = g.op("Where", column, tokens, g.float32("blank", 0))
        tokens, position_ids, known = self.known(tokens, position_ids)

        right = g.op("And", g.op("And", g.op("Equal", mask, real), in_order), known)
        count = g.op("ReduceSum", g.cast(right, "bool", "int64"), g.integers(1), keepdims=1)
        whole = g.op("Unsqueeze", g.op("Equal", count, self._length), g.integers(-1))  # [B, 1, 1]
        key_mask = g.op("Where", whole, g.cast(column, "bool", "float32"), g.float32("nan", np.nan))
        log_gamma = log_decay(self.config)
        if log_gamma.ndim == 2:
            self._decay = g.op("Mul", StepDecay(log_gamma, position_ids).rows(g), key_mask)
        else:
            self._decay = self.chunk_terms(log_gamma, start, end)
        return tokens, position_ids, key_mask

    def chunk_terms(self, log_gamma: Array, start: Value, end: Value) -> ChunkDecay:
        """Powers of gamma: all T tokens, of which those from `start` to `end` `[B, 1]` are real, are one chunk."""
        return chunk_decay(self.g, log_gamma, self._length, start, end)

    def token_axis(self, x: Value) -> Value:
        """Rows are the tokens of one sequence after another."""
        return self.g.op("Reshape", x, self._shape)  # [B*T, N] -> [B, T, N]

    def retention(self, q: Value, k: Value, v: Value, past: Value) -> Pair:
        """A chunk by matrix products, or token by token where gamma belongs to the key dimension."""
        if isinstance(self._decay, Value):
            return self.ops.retention_tokens(self.g, q, k, v, past, self._decay)
        return self.ops.retention_chunk(self.g, q, k, v, past, self._decay)

    def last_rows(self, x: Value) -> Value:
        """The last real row of each sequence, and row 0 of one that is padding alone."""
        return self.g.op("GatherND", self.token_axis(x), self._last, batch_dims=1)  # [B*T, D] -> [B, D]
