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
        tokens, position_ids = inputs
        self._decay = StepDecay(log_decay(self.config), position_ids)
        return tokens, position_ids, None

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

    Padding on the right is exact. Row b has n_b real tokens; its state decays by gamma^n_b, k is 0 at padded tokens,
    and nothing else reads them. Their ids and positions are replaced by 0, so that they need not be valid. From the
    last layer's feed-forward on, only the last real token of each row is computed. A row that is padded elsewhere gets
    NaN as its logits and states.

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
            mask: `[B, T]` int64: ones, then zeros.
        """
        g = self.g
        position_ids = g.op("Mul", position_ids, mask)
        self._shape = g.op("Concat", g.op("Shape", mask), g.integers(-1), axis=0)
        self._length = g.op("Gather", self._shape, g.int64("one", 1), axis=0)
        counts = g.op("ReduceSum", mask, g.integers(1), keepdims=1)  # [B, 1]
        zero, one = g.int64("zero", 0), g.int64("one", 1)
        self._last = g.op("Max", g.op("Sub", counts, one), zero)
        column = g.op("Unsqueeze", mask, g.integers(-1))  # [B, T] -> [B, T, 1]
        # NaN in all keys of a row, and so in all that follows from them, is visibly wrong.
        nan = g.float32("nan", np.nan)
        key_mask = g.op("Where", self._right_padded(mask, counts), g.cast(column, "int64", "float32"), nan)
        log_gamma = log_decay(self.config)
        if log_gamma.ndim == 2:
            self._decay = g.op("Mul", StepDecay(log_gamma, position_ids).rows(g), key_mask)
        else:
            self._decay = self.chunk_terms(log_gamma, counts)
        if self.config.has_vocabulary:
            tokens = g.op("Mul", tokens, mask)
        else:
            blank = g.float32("blank", 0)
            tokens = g.op("Where", g.op("Equal", column, one), tokens, blank)
        return tokens, position_ids, key_mask

    def _right_padded(self, mask: Value, counts: Value) -> Value:
        """Whether each row of a mask with the sums n_b `[B, 1]` is n_b ones, then zeros, `[B, 1, 1]`."""
        g = self.g
        numbers = g.op("Range", g.int64("zero", 0), self._length, g.int64("one", 1))
        expected = g.cast(g.op("Less", numbers, counts), "bool", "int64")
        equal = g.cast(g.op("Equal", mask, expected), "bool", "int64")
        right = g.op("Equal", g.op("ReduceSum", equal, g.integers(1), keepdims=1), self._length)
        return g.op("Unsqueeze", right, g.integers(-1))

    def chunk_terms(self, log_gamma: Array, counts: Value) -> ChunkDecay:
        """Powers of gamma: all T tokens, of which `counts` `[B, 1]` are real, are one chunk."""
        return chunk_decay(self.g, log_gamma, self._length, counts)

    def token_axis(self, x: Value) -> Value:
        """Rows are the tokens of one sequence after another."""
        return self.g.op("Reshape", x, self._shape)  # [B*T, N] -> [B, T, N]

    def retention(self, q: Value, k: Value, v: Value, past: Value) -> Pair:
        """A chunk by matrix products, or token by token where gamma belongs to the key dimension."""
        if isinstance(self._decay, Value):
            return self.ops.retention_tokens(self.g, q, k, v, past, self._decay)
        return self.ops.retention_chunk(self.g, q, k, v, past, self._decay)

    def last_rows(self, x: Value) -> Value:
        """Row n_b - 1 of sequence b, and row 0 of one that is padding alone."""
        return self.g.op("GatherND", self.token_axis(x), self._last, batch_dims=1)  # [B*T, D] -> [B, D]
