"""What the options of quantization ask for, as a plan."""

from __future__ import annotations

from dataclasses import dataclass

from retnet_tools.errors import UsageError
from retnet_tools.graph.export import ExportPlan
from retnet_tools.graph.quantization import HalfType, WeightType
from retnet_tools.progress import Progress
from retnet_tools.quantize.budget import Budget
from retnet_tools.quantize.calibration import CalibrationOptions, CalibrationText, read_calibration
from retnet_tools.quantize.methods import find_method
from retnet_tools.quantize.plan import plan_quantization, plan_target
from retnet_tools.quantize.scheme import SchemeOptions, make_scheme
from retnet_tools.quantize.unfinished import Workplace


@dataclass(frozen=True)
class LearningOptions:
    """What is to be learnt from a text.

    Attributes:
        calibration: the text, for a calibrated method and to choose types on.
        budget: for types chosen by sensitivity.
        together: matrices that the graph keeps as one get one type.
        unseen: sha256 of a text that is not to be learnt from, since quality will be measured on it.
    """

    calibration: CalibrationOptions | None = None
    budget: Budget | None = None
    together: bool = False
    unseen: str | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and self.calibration is None:
            raise UsageError(
                "a target for size or bits without a text",
                "--calibration FILE",
                "types are chosen by how much predictions on it suffer",
            )
        if self.together and self.budget is None:
            raise UsageError("--keep-merged without a target", "--target-size or --target-bits")


NO_LEARNING = LearningOptions()


def plan_request(
    plan: ExportPlan,
    target: WeightType | HalfType,
    options: SchemeOptions,
    learning: LearningOptions = NO_LEARNING,
    *,
    work: Workplace,
    progress: Progress,
) -> tuple[ExportPlan, CalibrationText | None]:
    """The plan of what is asked for, and the text for `make_method`.

    Args:
        plan: of float weights.
        target: what `--quantize` names.
        work: the place for results that are worth keeping if the run is stopped.

    Raises:
        UsageError: options that do not fit one another or the model, or a text to calibrate on that is also the one to
            measure on, besides those of `plan_target` and `plan_mixed`.
        InputError: a text that cannot be read.
    """
    if learning.calibration is None:
        return plan_target(plan, target, options), None
    if target != "int8" and target != "int4":
        raise UsageError(f"a text to calibrate on with {target} weights", "--quantize int8 or int4")
    scheme, checkpoint = make_scheme(target, options, ops=plan.ops), plan.checkpoint
    text = read_calibration(learning.calibration, checkpoint.config, checkpoint.tokenizer_files)
    if text.record.sha256 == learning.unseen:
        raise UsageError(
            f"{learning.calibration.file} is the text to calibrate on and the one to measure on",
            "two texts",
            "figures on what it has learnt from say little about others",
        )
    if learning.budget is None:
        if not find_method(scheme.method, text).calibrated:
            raise UsageError(f"a text to calibrate on with --method {scheme.method}", "a calibrated method or a target")
        return plan_quantization(plan, scheme, text), text
    # torch is not to be loaded where nothing is measured.
    from retnet_tools.quantize.mixed import plan_mixed

    mixed = plan_mixed(plan, scheme, learning.budget, text, work=work, progress=progress, together=learning.together)
    return mixed, text
