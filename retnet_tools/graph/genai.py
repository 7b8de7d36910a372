"""The graph for onnxruntime-genai: one for prompt and decoding, logits after the last real token of each row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from retnet_tools.graph.builder import TokenInputs
from retnet_tools.graph.chunks import Chunks
from retnet_tools.graph.contract import TensorSpec, genai_inputs, genai_outputs, padding_id
from retnet_tools.graph.decay import ChunkDecay, StepDecay, TokenDecay, chunk_decay
from retnet_tools.graph.nodes import if_else
from retnet_tools.graph.prefill import PrefillBuilder
from retnet_tools.graph.tables import log_decay
from retnet_tools.weights import Array


class GenaiBuilder(PrefillBuilder):
    """One token by the recurrence (Eq. 6), more by chunks of 128 (Eq. 7): cost and memory are linear in the prompt.

    onnxruntime-genai pads a batch on the right with its padding token and gives it position 0; every real token but
    the first of a sequence has a higher one. A row that has ended is fed the padding token at positions that count on:
    any embedding will do there, since nobody reads the result. Positions are each row's own.

    Logits have 1 in place of T, which onnxruntime-genai takes as the last real token of each row, and a column more
    than the vocabulary for the padding token: its search indexes them by every token of the sequence.
    """

    name = "retnet_genai"
    _step: StepDecay
    _one_token: ir.Value
    _chunks: Chunks
    _conv_states: list[ir.Value]

    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Inputs of model.onnx."""
        return genai_inputs(self.config, self.state_dtype)

    def output_specs(self) -> tuple[TensorSpec, ...]:
        """Outputs of model.onnx."""
        return genai_outputs(self.config, self.state_dtype)

    def read(self, inputs: Sequence[ir.Value]) -> TokenInputs:
        """Padding is where position_ids is 0 in a column other than the first."""
        g = self.g
        tokens, position_ids, *self._conv_states = inputs
        numbers = {"zero": 0, "one": 1, "minus_one": -1, "padding_id": padding_id(self.config), "nowhere": 1 << 40}
        zero, one, minus_one, padding, nowhere = (
            g.constant(name, np.array(i, dtype=np.int64)) for name, i in numbers.items()
        )
        tokens = g.op("Where", g.op("Equal", tokens, padding), zero, tokens)
        length = g.op("Gather", g.op("Shape", position_ids), one, axis=0)
        first = g.op("Equal", g.op("Range", zero, length, one), zero)  # [T]
        real = g.op("Or", first, g.op("Greater", position_ids, zero))
        # onnxruntime-genai's tokenizers give -1 for what they do not know, and a quantized embedding takes any id. The
        # CPU refuses to look up a position that is nowhere; CUDA checks no lookup, and the row becomes NaN.
        unknown = g.op("And", real, g.op("Or", g.op("Less", tokens, zero), g.op("Greater", tokens, padding)))
        tokens, position_ids = g.op("Where", unknown, zero, tokens), g.op("Where", unknown, nowhere, position_ids)
        self._one_token = g.op("Equal", length, one)
        self._step = StepDecay(log_decay(self.config), position_ids)
        mask = g.op("Where", unknown, minus_one, g.cast(real, "bool", "int64"))
        return self.blank_padding(tokens, position_ids, mask)

    def chunk_terms(self, log_gamma: Array, counts: ir.Value) -> ChunkDecay:
        """Several chunks of one length."""
        self._chunks = Chunks(self.g, self._shape, self._length)
        return chunk_decay(self.g, log_gamma, self._chunks.size, self._chunks.counts(self.g, counts))

    def retention(self, q: ir.Value, k: ir.Value, v: ir.Value, past: ir.Value) -> tuple[ir.Value, ir.Value]:
        """A step, or chunks one after another."""
        decay = self._decay
        if isinstance(decay, TokenDecay):
            return super().retention(q, k, v, past)
        return if_else(
            self.g,
            self._one_token,
            lambda g: self.ops.retention_step(g, q, k, v, past, self._step),
            lambda g: self.ops.retention_chunks(g, q, k, v, past, self._chunks, decay),
        )

    def logits(self, x: ir.Value) -> ir.Value:
        """Logits `[B, 1, vocab + 1]`."""
        lowest = self.g.constant("lowest", np.array(np.finfo(np.float32).min, dtype=np.float32))
        return self.g.op("Pad", super().logits(x), self.g.integers(0, 1), lowest, self.g.integers(-1))

    def further_outputs(self) -> list[ir.Value]:
        """conv_state, which RetNet has none of; onnxruntime-genai finds no recurrent_state without it."""
        return [self.g.op("Identity", state) for state in self._conv_states]
