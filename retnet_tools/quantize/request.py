"""What `--quantize` and its options ask for, as a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from retnet_tools.errors import UsageError
from retnet_tools.graph.export import ExportPlan
from retnet_tools.graph.quantization import WeightType
from retnet_tools.quantize.budget import Budget
from retnet_tools.quantize.calibration import CalibrationOptions, CalibrationText, read_calibration
from retnet_tools.quantize.methods import Progress, find_method
from retnet_tools.quantize.plan import plan_half, plan_quantization
from retnet_tools.quantize.scheme import NO_OPTIONS, TARGET_WORDS, HalfType, SchemeOptions, make_scheme


@dataclass(frozen=True)
class QuantizationRequest:
    """The options of quantization, as given.

    Attributes:
        target: what `--quantize` names.
        calibration: a text for a calibrated method, and to choose types on.
        budget: for types chosen by sensitivity.
        together: matrices that the graph keeps as one get one type.
    """

    target: WeightType | HalfType
    options: SchemeOptions = NO_OPTIONS
    calibration: CalibrationOptions | None = None
    budget: Budget | None = None
    together: bool = False

    def __post_init__(self) -> None:
        others = (self.options, self.calibration, self.budget, self.together)
        if self.target not in ("int8", "int4") and others != (NO_OPTIONS, None, None, False):
            raise UsageError(f"options of a quantization scheme with {TARGET_WORDS[self.target]}", "none of them")
        if self.budget is not None and self.calibration is None:
            raise UsageError(
                "a target for size or bits without a text",
                "--calibration FILE",
                "types are chosen by how much the model's predictions on it suffer",
            )
        if self.together and self.budget is None:
            raise UsageError("--keep-merged without a target", "--target-size or --target-bits")


def plan_request(
    plan: ExportPlan, request: QuantizationRequest, *, work: Path, progress: Progress
) -> tuple[ExportPlan, CalibrationText | None]:
    """The plan of what is asked for, and the text for `write_quantized`.

    Args:
        plan: of float weights.
        work: the folder for results that are worth keeping if the run is stopped.

    Raises:
        UsageError: options that do not fit one another or the model, besides those of `plan_mixed` and `plan_half`.
        InputError: a text that cannot be read.
    """
    target = request.target
    if target != "int8" and target != "int4":
        return plan_half(plan, target), None
    scheme = make_scheme(target, request.options, ops=plan.ops)
    if request.calibration is None:
        return plan_quantization(plan, scheme), None
    checkpoint = plan.checkpoint
    text = read_calibration(request.calibration, checkpoint.config, checkpoint.tokenizer_files)
    if request.budget is None:
        if not find_method(scheme.method, text).calibrated:
            raise UsageError(f"a text to calibrate on with --method {scheme.method}", "a calibrated method or a target")
        return plan_quantization(plan, scheme, text), text
    # torch is not to be loaded where nothing is measured.
    from retnet_tools.quantize.mixed import plan_mixed

    return (
        plan_mixed(plan, scheme, request.budget, text, work=work, progress=progress, together=request.together),
        text,
    )
