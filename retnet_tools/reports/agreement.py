"""What `verify` reports."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from retnet_tools.console import ResultTable, print_line, result_console, verdict
from retnet_tools.jobs.verify import VerifyResult
from retnet_tools.model.budgets import CAUSES

if TYPE_CHECKING:
    from retnet_tools.model.agreement import AgreementReport, Comparison, Handoff

SCHEMA_VERSION = 1


def agreement_document(result: VerifyResult) -> dict[str, Any]:
    """The JSON document of `retnet-tools verify`."""
    report = result.report
    budget = report.budget
    return {
        "schema_version": SCHEMA_VERSION,
        "request": result.request.to_dict(),
        "checkpoint": str(result.checkpoint),
        "dtype": report.dtype,
        "tokens": {"source": result.tokens, "rows": report.rows, "length": report.tokens},
        "logits_scale": report.logits_scale,
        "budget": {
            "rounding": budget.rounding,
            "normalisation-epsilon": budget.epsilon,
            "logic": budget.logic,
            "tolerance": budget.tolerance,
        },
        "comparisons": [_comparison_fields(c, report.dtype) for c in report.comparisons],
        "handoffs": [_handoff_fields(h) for h in report.handoffs],
        "clamp": None if report.clamp is None else _clamp_fields(report),
        "notes": [*result.notes, *report.notes],
        "passed": report.passed,
    }


def render_agreement(result: VerifyResult) -> None:
    """Print what `retnet-tools verify` found: a column for each pair of forms, then what the causes mean."""
    console, report = result_console(), result.report
    tokens = f"{report.rows} x {report.tokens} tokens ({result.tokens})"
    print_line(console, f"{result.checkpoint}: {tokens}, {report.dtype}, logits up to {report.logits_scale:.3g}")
    table = ResultTable("logits", *(f"{c.a} / {c.b}" for c in report.comparisons))
    cells = [_comparison_cells(c) for c in report.comparisons]
    for heading in cells[0]:
        table.add_row(heading, *(column[heading] for column in cells))
    console.print(table)
    for cause in sorted({c.cause for c in report.comparisons if c.run.max_abs != 0}):
        print_line(console, f"{cause}: {CAUSES[cause]}.")
    for line in (*_handoff_lines(report), *_clamp_lines(report), *result.notes, *report.notes):
        print_line(console, line)
    console.print(verdict(report.passed))


def _comparison_fields(c: Comparison, dtype: str) -> dict[str, Any]:
    return {
        "a": c.a,
        "b": c.b,
        "dtype": dtype,
        "max_abs": c.run.max_abs,
        "max_rel": c.run.max_rel,
        "kl_mean": c.run.kl_mean,
        "top1_agreement": c.run.top1_agreement,
        "max_abs_float64": c.float64.max_abs,
        "max_abs_float64_eps0": c.float64_eps0.max_abs,
        "first_layer": c.first_layer,
        "per_layer_max_abs": list(c.run.layers),
        "cause": c.cause,
        "passed": c.passed,
    }


def _comparison_cells(c: Comparison) -> dict[str, str]:
    return {
        "max abs": f"{c.run.max_abs:.1e}",
        "max rel": f"{c.run.max_rel:.1e}",
        "mean KL": "-" if c.run.kl_mean is None else f"{c.run.kl_mean:.1e}",
        "same top 1": "-" if c.run.top1_agreement is None else f"{c.run.top1_agreement:.2%}",
        "in float64": f"{c.float64.max_abs:.1e}",
        "and eps 0": f"{c.float64_eps0.max_abs:.1e}",
        "first layer": "-" if c.first_layer is None else str(c.first_layer),
        "cause": c.cause,
        "result": verdict(c.passed),
    }


def _handoff_fields(h: Handoff) -> dict[str, Any]:
    return {
        "prefix_form": h.prefix_form,
        "continue_form": h.continue_form,
        "prefix_length": h.prefix_length,
        "max_abs": h.max_abs,
        "passed": h.passed,
    }


def _handoff_lines(report: AgreementReport) -> Iterable[str]:
    if not report.handoffs:
        return
    good = sum(h.passed for h in report.handoffs)
    lengths = ", ".join(str(p) for p in sorted({h.prefix_length for h in report.handoffs}))
    worst = max(report.handoffs, key=lambda h: (not h.passed, h.max_abs)).max_abs
    yield (
        f"hand-offs: {good} of {len(report.handoffs)} agree (after {lengths} tokens); "
        f"worst {worst:.1e} (float64, eps 0)"
    )
    for h in report.handoffs:
        if not h.passed:
            yield f"  {h.prefix_length} tokens in {h.prefix_form}, continued in {h.continue_form}: {h.max_abs:.1e}"


def _clamp_fields(report: AgreementReport) -> dict[str, Any]:
    tried = [
        {"clamp": fit.clamp, "against": fit.against, "max_abs": fit.run, "max_abs_float64": fit.float64}
        for fit in report.clamps
    ]
    return {"fits": report.clamp, "tried": tried}


def _clamp_lines(report: AgreementReport) -> Iterable[str]:
    if report.clamp is None:
        return
    against = report.clamps[0].against
    apart = ", ".join(f"{fit.run:.1e} (float64 {fit.float64:.1e}) under {_option(fit.clamp)}" for fit in report.clamps)
    yield f"parallel and {against} differ by {apart}: {_option(report.clamp)} fits better and is judged"
    yield (
        "nothing in the files tells which clamp the model was trained with, nor does the fit, as abs-of-sum divides by "
        "less in any model; if you know, --clamp NAME names it here, and convert --clamp NAME keeps it"
    )


def _option(clamp: str) -> str:
    return clamp.replace("_", "-")
