"""The two steps of quantization, which `export --quantize` and `quantize` share: plan it, and write it.

    with Workplace(unfinished_folder(out)) as work:
        plan = plan_quantized(plan, QuantizeOptions("int4", target_bits=5, calibration=Path("text")), work=work)
        manifest = write_quantized(plan, out, work=work, force=False)

What takes long is kept in the workplace, so that the next run goes on from there if this one is stopped; writing
removes it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from retnet_tools.errors import InputError, RangeError, UsageError
from retnet_tools.graph.contract import CARD_FILE
from retnet_tools.graph.export import ExportPlan, write_export
from retnet_tools.graph.folder import float_blocks
from retnet_tools.graph.manifest import Manifest
from retnet_tools.graph.nodes import ELEMENT_TYPES
from retnet_tools.graph.quantization import Quantization
from retnet_tools.progress import Progress, in_megabytes, no_progress
from retnet_tools.quantize.calibration import read_calibration
from retnet_tools.quantize.card import check_card, model_card
from retnet_tools.quantize.contents import QuantizedContents
from retnet_tools.quantize.methods import MethodTask, find_method
from retnet_tools.quantize.options import DEFAULT_TOKENS, QuantizeOptions
from retnet_tools.quantize.plan import QuantizedPlan, plan_blocks, plan_half
from retnet_tools.quantize.unfinished import Workplace, unfinished_folder
from retnet_tools.weights import FiniteWeights


def plan_quantized(
    plan: ExportPlan,
    options: QuantizeOptions,
    *,
    work: Workplace | None = None,
    progress: Progress = no_progress,
    unseen: str | None = None,
) -> QuantizedPlan:
    """The plan of what is asked for. Weights are read only where types are chosen by sensitivity.

    Args:
        plan: of float weights, from `plan_export` or `plan_of_export`; it stays as it is.
        work: the place for results that are worth keeping; needed for a target of size or bits.
        progress: what is done now, steps done, steps in all.
        unseen: sha256 of a text that is not to be learnt from, since quality will be measured on it.

    Raises:
        UsageError: options that do not fit the model or its graphs, a method that does not exist or lacks its text, a
            text that is not used or is not to be learnt from, a target that cannot be met.
        InputError: a text that cannot be read; weights or logits that are not finite, where they are read.
    """
    if options.is_half:
        return plan_half(plan, options.type)
    scheme, checkpoint = options.scheme(plan.ops), plan.checkpoint
    if options.calibration is None:
        return plan_blocks(plan, scheme)
    tokens, seed = options.calibration_tokens or DEFAULT_TOKENS, options.seed or 0
    text = read_calibration(options.calibration, tokens, seed, checkpoint.config, checkpoint.tokenizer_files)
    if text.record.sha256 == unseen:
        raise UsageError(
            f"{options.calibration} is the text to calibrate on and the one to measure on",
            "two texts",
            "figures on what it has learnt from say little about others",
        )
    if not options.has_target:
        if not find_method(scheme.method, text).calibrated:
            raise UsageError(f"a text to calibrate on with --method {scheme.method}", "a calibrated method or a target")
        return plan_blocks(plan, scheme, text)
    # torch is not to be loaded where nothing is measured.
    from retnet_tools.quantize.mixed import plan_mixed

    if work is None:
        raise ValueError("a target without a place to work")
    return plan_mixed(
        plan,
        scheme,
        text,
        work=work,
        progress=progress,
        target_size=options.target_size,
        target_bits=options.target_bits,
        together=options.keep_merged,
    )


def write_quantized(
    plan: ExportPlan,
    out: Path,
    *,
    force: bool,
    work: Workplace | None = None,
    progress: Progress = no_progress,
) -> Manifest:
    """Choose the codes of a plan's matrices and write its folder; see `write_export`.

    A calibrated method does its work before anything is written. Float weights are read tensor by tensor.

    Args:
        plan: from `plan_quantized`; one of float weights is written as it is.
        work: the place that the plan was made with; what was kept there is removed in the end. None takes the one
            that belongs to `out`.
        progress: what is done now, steps or megabytes done, and in all.

    Raises:
        UsageError: a README of somebody else's in the place of the card.
        InputError: weights that are NaN or infinite, or do not fit the float type, besides those of `write_export` and
            of the method.
        OutputError: as `write_export`, or no room for what a method keeps.
    """
    told = in_megabytes(progress, "write", plan.weight_bytes)
    source, record = plan.checkpoint.weights, plan.quantization
    texts = {} if record is None else {CARD_FILE: model_card}
    if record is not None:
        check_card(out)
    if not isinstance(plan, QuantizedPlan) or record is None or record.blocks is None:
        read = float_blocks(FiniteWeights(source))
        try:
            return write_export(plan, out, force=force, progress=told, read=read, texts=texts)
        except RangeError as error:
            if record is None:
                raise
            action = "use --quantize bf16, or keep float32" if plan.dtype == "float16" else "keep float32"
            raise InputError(error.found, error.expected, action) from error
    blocks = record.blocks
    with work or Workplace(unfinished_folder(out)) as place:
        dtype = ELEMENT_TYPES[plan.dtype].numpy()
        task = MethodTask(plan.checkpoint.config, source, plan.formats, dtype, plan.calibration, place, progress)
        contents = QuantizedContents(source, find_method(blocks.method, plan.calibration).make(task), plan.dtype)

        def written() -> Quantization:
            return dataclasses.replace(record, coarse_blocks=contents.coarse_blocks)

        manifest = write_export(plan, out, force=force, progress=told, read=contents, texts=texts, quantization=written)
        place.remove()
    return manifest
