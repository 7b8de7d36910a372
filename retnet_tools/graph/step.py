"""The step graph: one token in, logits and new states out."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from retnet_tools.graph.builder import DecoderBuilder, TokenInputs
from retnet_tools.graph.contract import TensorSpec, step_inputs, step_outputs
from retnet_tools.graph.decay import StepDecay
from retnet_tools.graph.tables import log_decay


class StepBuilder(DecoderBuilder):
    """o_n = q_n S_n with S_n = gamma S_(n-1) + k_n^T v_n in every layer (Eq. 6, 8, 9); T is 1."""

    name = "retnet_step"
    _decay: StepDecay

    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Inputs of step.onnx."""
        return step_inputs(self.config, self.state_dtype)

    def output_specs(self) -> tuple[TensorSpec, ...]:
        """Outputs of step.onnx."""
        return step_outputs(self.config, self.state_dtype)

    def read(self, inputs: Sequence[ir.Value]) -> TokenInputs:
        """Every token is real."""
        tokens, position_ids = inputs
        self._decay = StepDecay(log_decay(self.config), position_ids)
        return TokenInputs(tokens, position_ids)

    def token_axis(self, x: ir.Value) -> ir.Value:
        """One row is one sequence."""
        return self.g.op("Unsqueeze", x, self.g.integers(1))  # [B, N] -> [B, 1, N]

    def retention(self, q: ir.Value, k: ir.Value, v: ir.Value, past: ir.Value) -> tuple[ir.Value, ir.Value]:
        """One step of the recurrence."""
        return self.ops.retention_step(self.g, q, k, v, past, self._decay)

    def last_rows(self, x: ir.Value) -> ir.Value:
        """The only row."""
        return x
