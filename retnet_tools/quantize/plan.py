"""From a plan of float weights to one of quantized weights. No weight is read here: `write_quantized` does that, and
whoever has codes from elsewhere can write the same plan with `retnet_tools.graph.export.write_export`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from retnet_tools.errors import InputError, RangeError, UsageError
from retnet_tools.graph.contract import CARD_FILE
from retnet_tools.graph.export import ExportPlan, plan_export, write_export
from retnet_tools.graph.manifest import Manifest
from retnet_tools.graph.nodes import ELEMENT_TYPES
from retnet_tools.graph.quantization import BlockFormat, HalfScheme, HalfType, Quantization, Scheme, WeightType
from retnet_tools.graph.targets import find_target, operator_set
from retnet_tools.graph.writer import float_blocks
from retnet_tools.progress import Progress, no_progress
from retnet_tools.quantize.calibration import CalibrationText
from retnet_tools.quantize.card import check_card, model_card
from retnet_tools.quantize.contents import QuantizedContents
from retnet_tools.quantize.methods import Method, MethodTask, find_method
from retnet_tools.quantize.rewrite import quantize_graph
from retnet_tools.quantize.scheme import NO_OPTIONS, TARGET_WORDS, SchemeOptions, make_scheme, matrix_formats
from retnet_tools.quantize.unfinished import Workplace, unfinished_folder
from retnet_tools.weights import FiniteWeights, canonical_shapes


def plan_quantization(plan: ExportPlan, scheme: Scheme, text: CalibrationText | None = None) -> ExportPlan:
    """The plan that writes quantized weights in place of a plan's float ones.

    Args:
        plan: from `plan_export` or `plan_of_export`; it stays as it is.
        text: for a calibrated method; another does not look at it.

    Raises:
        UsageError: a method that does not exist or lacks its text, a pattern that finds no matrix, nothing to quantize.
    """
    learnt = text if find_method(scheme.method, text).calibrated else None
    config, ops = plan.checkpoint.config, operator_set(plan.ops, plan.device)
    formats, shapes = matrix_formats(scheme, config), canonical_shapes(config)
    graphs = {
        name: quantize_graph(graph, ops, formats, shapes, scheme.accuracy_level) for name, graph in plan.graphs.items()
    }
    quantized = dataclasses.replace(plan, graphs=graphs)
    calibration = None if learnt is None else learnt.record
    record = Quantization(scheme, plan.weight_bytes, quantized.weight_bytes, calibration)
    notes = (*plan.notes, *(() if learnt is None else _few_tokens(learnt, formats, shapes)))
    return dataclasses.replace(quantized, quantization=record, notes=notes)


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
    record = Quantization(HalfScheme(dtype), plan.weight_bytes, half.weight_bytes)
    return dataclasses.replace(half, files=plan.files, provenance=plan.provenance, quantization=record)


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
    plan: ExportPlan, text: CalibrationText | None = None, *, work: Workplace, progress: Progress = no_progress
) -> Method | None:
    """The method of a plan; a calibrated one does its work here. None for a plan without matrices in blocks.

    Args:
        plan: from `plan_quantization`, with the same text, or `plan_half`.
        work: the place for what a calibrated method keeps if the run is stopped.
        progress: what it does now, steps done, steps in all.

    Raises:
        UsageError: a calibrated method without a text.
        InputError, OutputError: as the method.
    """
    if plan.quantization is None or (scheme := plan.quantization.blocks) is None:
        return None
    config = plan.checkpoint.config
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
        UsageError: no method for a plan of a calibrated one, or a README of somebody else's in the place of the card.
        InputError: weights that are NaN or infinite, or do not fit the float type, besides those of `write_export`.
    """
    source, record = plan.checkpoint.weights, plan.quantization
    texts = {} if record is None else {CARD_FILE: model_card}
    if record is not None:
        check_card(out)
    method = method or make_method(plan, work=Workplace(unfinished_folder(out)))
    if method is None:
        read = float_blocks(FiniteWeights(source))
        try:
            return write_export(plan, out, force=force, progress=progress, read=read, texts=texts)
        except RangeError as error:
            if record is None:
                raise
            action = "use --quantize bf16, or keep float32" if plan.dtype == "float16" else "keep float32"
            raise InputError(error.found, error.expected, action) from error
    contents = QuantizedContents(source, method, plan.dtype)

    def written() -> Quantization:
        assert record is not None
        return dataclasses.replace(record, coarse_blocks=contents.coarse_blocks)

    return write_export(plan, out, force=force, progress=progress, read=contents, texts=texts, quantization=written)


def _few_tokens(
    text: CalibrationText, formats: Mapping[str, BlockFormat | None], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """A note where a text says less about inputs than there are inputs."""
    widest = max(shapes[name][1] for name, format in formats.items() if format is not None)
    if text.sequences.size >= widest:
        return ()
    return (
        f"{text.sequences.size} tokens to calibrate on are fewer than the {widest} inputs of the widest matrix: how "
        "these go together is hardly seen, and a longer text would do better",
    )
