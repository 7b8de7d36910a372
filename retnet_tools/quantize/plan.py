"""From a plan of float weights to one of quantized weights. No weight is read here: `write_quantized` does that, and
whoever has codes from elsewhere can write the same plan with `retnet_tools.graph.export.write_export`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from retnet_tools.errors import UsageError
from retnet_tools.graph.devices import operator_set
from retnet_tools.graph.export import ExportPlan, plan_export, write_export
from retnet_tools.graph.manifest import Manifest
from retnet_tools.graph.nodes import ELEMENT_TYPES
from retnet_tools.graph.quantization import Quantization, Scheme, WeightType
from retnet_tools.graph.targets import find_target
from retnet_tools.graph.writer import float_blocks
from retnet_tools.quantize.calibration import CalibrationText
from retnet_tools.quantize.card import CARD_FILE, model_card
from retnet_tools.quantize.contents import QuantizedContents
from retnet_tools.quantize.methods import Method, MethodTask, Progress, find_method
from retnet_tools.quantize.rewrite import quantize_graph
from retnet_tools.quantize.scheme import (
    NO_OPTIONS,
    TARGET_WORDS,
    HalfType,
    SchemeOptions,
    make_scheme,
    matrix_formats,
)
from retnet_tools.quantize.unfinished import unfinished_folder
from retnet_tools.weights import FiniteWeights, canonical_shapes


def plan_quantization(plan: ExportPlan, scheme: Scheme, text: CalibrationText | None = None) -> ExportPlan:
    """The plan that writes quantized weights in place of a plan's float ones.

    Args:
        plan: from `plan_export` or `plan_of_export`; it stays as it is.
        text: for a calibrated method, or what types were chosen on.

    Raises:
        UsageError: a method that does not exist or lacks its text, a pattern that finds no matrix, nothing to quantize.
    """
    find_method(scheme.method, text)
    config, ops = plan.checkpoint.config, operator_set(plan.ops, plan.device)
    formats, shapes = matrix_formats(scheme, config), canonical_shapes(config)
    graphs = {
        name: quantize_graph(graph, ops, formats, shapes, scheme.accuracy_level) for name, graph in plan.graphs.items()
    }
    quantized = dataclasses.replace(plan, graphs=graphs)
    record = Quantization(
        scheme, plan.tensor_bytes, quantized.tensor_bytes, calibration=None if text is None else text.record
    )
    return dataclasses.replace(quantized, quantization=record)


def plan_half(plan: ExportPlan, dtype: HalfType) -> ExportPlan:
    """The plan of the same model with weights and activations in float16 or bfloat16; states keep their type.

    Raises:
        UsageError: the weights are not float32.
    """
    if plan.dtype != "float32":
        raise UsageError(f"{plan.checkpoint.path} has {plan.dtype} weights", "an export in float32")
    target = find_target(plan.graphs).name
    half = plan_export(
        plan.checkpoint,
        dtype=dtype,
        ops=plan.ops,
        state_dtype=plan.state_dtype,
        target=target,
        device=plan.device,
    )
    return dataclasses.replace(half, files=plan.files, provenance=plan.provenance)


def plan_target(plan: ExportPlan, target: WeightType | HalfType, options: SchemeOptions) -> ExportPlan:
    """The plan for what `--quantize` names.

    Raises:
        UsageError: options of a scheme with a half-precision target, besides those of `make_scheme`,
            `plan_quantization` and `plan_half`.
    """
    if target == "int8" or target == "int4":
        return plan_quantization(plan, make_scheme(target, options, ops=plan.ops))
    if options != NO_OPTIONS:
        raise UsageError(f"options of a quantization scheme with {TARGET_WORDS[target]}", "none of them")
    return plan_half(plan, target)


def make_method(
    plan: ExportPlan, text: CalibrationText | None = None, *, work: Path, progress: Progress = lambda *step: None
) -> Method | None:
    """The method of a plan; a calibrated one does its work here. None for a plan that quantizes nothing.

    Args:
        plan: from `plan_quantization`, with the same text, or `plan_half`.
        work: the folder for what a calibrated method keeps if the run is stopped.
        progress: what it does now, steps done, steps in all.

    Raises:
        UsageError: a calibrated method without a text.
        InputError, OutputError: as the method.
    """
    if plan.quantization is None:
        return None
    scheme, config = plan.quantization.scheme, plan.checkpoint.config
    formats, dtype = matrix_formats(scheme, config), ELEMENT_TYPES[plan.dtype].numpy()
    task = MethodTask(config, plan.checkpoint.weights, formats, dtype, text, work, progress)
    return find_method(scheme.method, text).make(task)


def write_quantized(
    plan: ExportPlan, out: Path, *, force: bool, progress: Callable[[int], None], method: Method | None = None
) -> Manifest:
    """Read the float weights tensor by tensor and write the folder of a plan; see `write_export`.

    Args:
        plan: from `plan_quantization` or `plan_half`.
        method: from `make_method`; None makes the plan's, if it needs no text.

    Raises:
        UsageError: no method for a plan of a calibrated one.
        InputError: weights that are NaN or infinite, or do not fit the float type, besides those of `write_export`.
    """
    source = plan.checkpoint.weights
    method = method or make_method(plan, work=unfinished_folder(out))
    if method is None:
        return write_export(plan, out, force=force, progress=progress, read=float_blocks(FiniteWeights(source)))
    read = QuantizedContents(source, method, plan.dtype)
    return write_export(plan, out, force=force, progress=progress, read=read, texts={CARD_FILE: model_card})
