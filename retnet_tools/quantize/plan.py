"""From a plan of float weights to one of quantized weights. No weight is read here: `write_quantized` does that, and
whoever has codes from elsewhere can write the same plan with `retnet_tools.graph.export.write_export`.

`retnet_tools.quantize.steps` makes these plans of what a user asks for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from retnet_tools.errors import UsageError
from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.graph.export import ExportPlan, plan_export
from retnet_tools.graph.quantization import HalfScheme, Quantization, Scheme
from retnet_tools.graph.targets import find_target, operator_set
from retnet_tools.quantize.calibration import CalibrationText
from retnet_tools.quantize.methods import find_method
from retnet_tools.quantize.options import matrix_formats
from retnet_tools.quantize.rewrite import quantize_graph
from retnet_tools.weights import canonical_shapes


@dataclass(frozen=True)
class QuantizedPlan(ExportPlan):
    """What a quantized export will write.

    Attributes:
        formats: of every matrix by canonical name, None where it stays float; empty for a half type.
        calibration: what a calibrated method learns from.
    """

    formats: Mapping[str, BlockFormat | None] = field(default_factory=dict)
    calibration: CalibrationText | None = None


def plan_blocks(plan: ExportPlan, scheme: Scheme, text: CalibrationText | None = None) -> QuantizedPlan:
    """The plan that writes matrices in blocks in place of a plan's float ones.

    Args:
        plan: from `plan_export` or `plan_of_export`; it stays as it is.
        text: for a calibrated method; another does not look at it.

    Raises:
        UsageError: a method that does not exist or lacks its text, a pattern that finds no matrix, nothing to quantize.
    """
    learnt = text if find_method(scheme.method, text).calibrated else None
    config, ops = plan.checkpoint.config, operator_set(plan.ops, plan.device, plan.opset)
    formats, shapes = matrix_formats(scheme, config), canonical_shapes(config)
    graphs = {
        name: quantize_graph(graph, ops, formats, shapes, scheme.accuracy_level) for name, graph in plan.graphs.items()
    }
    notes = plan.notes
    widest = max(shapes[name][1] for name, format in formats.items() if format is not None)
    if learnt is not None and learnt.sequences.size < widest:
        notes += (
            f"{learnt.sequences.size} tokens to calibrate on are fewer than the {widest} inputs of the widest matrix: "
            "how these go together is hardly seen, and a longer text would do better",
        )
    quantized = QuantizedPlan(**{**vars(plan), "graphs": graphs, "notes": notes}, formats=formats, calibration=learnt)
    record = Quantization(scheme, plan.weight_bytes, quantized.weight_bytes, learnt.record if learnt else None)
    return dataclasses.replace(quantized, quantization=record)


def plan_half(plan: ExportPlan, dtype: str) -> QuantizedPlan:
    """The plan of the same model with weights and activations in float16 or bfloat16; states keep their type.

    Raises:
        UsageError: the weights are not float32.
    """
    if plan.dtype != "float32":
        raise UsageError(f"{plan.checkpoint.path} has {plan.dtype} weights", "an export in float32")
    half = plan_export(
        plan.checkpoint,
        dtype=dtype,
        ops=plan.ops,
        state_dtype=plan.state_dtype,
        target=find_target(plan.graphs).name,
        device=plan.device,
        opset=plan.opset,
    )
    record = Quantization(HalfScheme(dtype), plan.weight_bytes, half.weight_bytes)
    kept = {"files": plan.files, "provenance": plan.provenance, "quantization": record}
    return QuantizedPlan(**{**vars(half), **kept})
