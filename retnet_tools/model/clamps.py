"""Agreement of the forms where nothing in a checkpoint tells which clamp of the scores its parallel form had.

The clamp divides each row of scores by at least 1, and the head norm cancels that up to its epsilon: the recurrence is
the same under both clamps, and the parallel form is the nearer to it the less it divides. So both are tried, and the
one that fits better is judged. That is abs_of_sum for almost any model, since |sum R| <= sum |R|: a better fit is no
evidence of the clamp that the model was trained with, and nothing in its weights is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import inf, isfinite
from typing import Any

import numpy.typing as npt
from torch import Tensor

from retnet_tools.config import RetNetConfig, ScoreClamp
from retnet_tools.dtypes import FloatName
from retnet_tools.model.agreement import AgreementReport, ClampFit, compare_forms
from retnet_tools.model.retention import RetentionForm
from retnet_tools.progress import Progress, no_progress
from retnet_tools.weights import WeightSource

CLAMPS: tuple[ScoreClamp, ...] = ("abs_of_sum", "sum_of_abs")
PARALLEL = "parallel"


def compare_clamps(
    config: RetNetConfig,
    weights: WeightSource,
    inputs: npt.NDArray[Any],
    forms: Mapping[str, RetentionForm],
    *,
    dtype: FloatName = "float32",
    tolerance: float | None = None,
    progress: Progress = no_progress,
) -> AgreementReport:
    """Compare the forms as `compare_forms` does, the parallel one under both clamps; the better fit is reported.

    The better fit is the smaller difference to the recurrent form (or the chunkwise one, without it) in float64.
    Without the parallel form among `forms` there is nothing to choose.

    Memory: as `compare_forms`, with one form more.

    Raises:
        UsageError, InputError: as `compare_forms`.
    """
    options: dict[str, Any] = {"dtype": dtype, "tolerance": tolerance, "progress": progress}
    if PARALLEL not in forms:
        return compare_forms(config, weights, inputs, forms, **options)
    assumed = config.score_normalization.clamp
    other = next(clamp for clamp in CLAMPS if clamp != assumed)
    names = {assumed: PARALLEL, other: f"{PARALLEL}, {other}"}
    both: dict[str, RetentionForm] = {}
    for name, form in forms.items():
        both[name] = form
        if name == PARALLEL:
            both[names[other]] = partial(_under, form, other)
    report = compare_forms(config, weights, inputs, both, **options)
    against = "recurrent" if "recurrent" in forms else next(name for name in forms if name != PARALLEL)
    fits = tuple(_fit(report, clamp, names[clamp], against) for clamp in names)
    best = min(fits, key=lambda fit: fit.float64 if isfinite(fit.float64) else inf)
    dropped = next(name for clamp, name in names.items() if clamp != best.clamp)
    return replace(_with_one_parallel(report, names[best.clamp], dropped), clamps=fits, clamp=best.clamp)


def _under(
    form: RetentionForm, clamp: ScoreClamp, *arguments: Tensor, score_clamp: ScoreClamp = "none", **options: Any
) -> tuple[Tensor, Tensor]:
    """A form under this clamp, whatever the model's."""
    return form(*arguments, score_clamp=clamp, **options)


def _fit(report: AgreementReport, clamp: ScoreClamp, name: str, against: str) -> ClampFit:
    comparison = next(c for c in report.comparisons if {c.a, c.b} == {name, against})
    return ClampFit(clamp, against, comparison.run.max_abs, comparison.float64.max_abs)


def _with_one_parallel(report: AgreementReport, kept: str, dropped: str) -> AgreementReport:
    def named(name: str) -> str:
        return PARALLEL if name == kept else name

    return replace(
        report,
        comparisons=tuple(
            replace(c, a=named(c.a), b=named(c.b)) for c in report.comparisons if dropped not in (c.a, c.b)
        ),
        handoffs=tuple(
            replace(h, prefix_form=named(h.prefix_form), continue_form=named(h.continue_form))
            for h in report.handoffs
            if dropped not in (h.prefix_form, h.continue_form)
        ),
    )
