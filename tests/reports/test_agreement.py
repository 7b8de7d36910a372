"""What `verify` shows of its report: each figure under its name, and a failure wherever it stands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from retnet_tools.jobs.verify import VerifyRequest, VerifyResult
from retnet_tools.model.agreement import AgreementReport, Comparison, Handoff
from retnet_tools.model.budgets import Budget
from retnet_tools.model.runs import Difference
from retnet_tools.reports.agreement import agreement_document, render_agreement


def difference(max_abs: float) -> Difference:
    return Difference(max_abs, 2 * max_abs, 3 * max_abs, 0.75, (max_abs, 4 * max_abs), 1)


REPORT = AgreementReport(
    dtype="float32",
    rows=2,
    tokens=20,
    logits_scale=5.0,
    budget=Budget.of("float32", 5.0, None),
    comparisons=(
        Comparison("parallel", "recurrent", difference(1e-2), difference(1e-4), difference(1e-6), "logic", "logic"),
        Comparison("recurrent", "chunkwise", difference(1e-6), difference(1e-12), difference(0.0), "rounding", None),
    ),
    handoffs=(Handoff("parallel", "recurrent", 7, 2e-9, False), Handoff("recurrent", "parallel", 9, 1e-12, True)),
    notes=("a note",),
)


def result(report: AgreementReport = REPORT) -> VerifyResult:
    return VerifyResult(VerifyRequest(), Path("ckpt"), "random, seed 0", (), report)


def test_the_document_has_each_figure_under_its_name() -> None:
    document = agreement_document(result())
    assert document["passed"] is False
    first, second = document["comparisons"]
    assert (first["max_abs"], first["max_abs_float64"], first["max_abs_float64_eps0"]) == (1e-2, 1e-4, 1e-6)
    assert (first["max_rel"], first["kl_mean"], first["top1_agreement"]) == (2e-2, 3e-2, 0.75)
    assert (first["per_layer_max_abs"], first["first_layer"]) == ([1e-2, 4e-2], 1)
    assert [(row["cause"], row["passed"]) for row in (first, second)] == [("logic", False), ("rounding", True)]
    assert [(row["prefix_form"], row["continue_form"], row["prefix_length"]) for row in document["handoffs"]] == [
        ("parallel", "recurrent", 7),
        ("recurrent", "parallel", 9),
    ]
    assert [(row["max_abs"], row["passed"]) for row in document["handoffs"]] == [(2e-9, False), (1e-12, True)]
    assert document["budget"] == {"rounding": 1e-4, "normalisation-epsilon": 1e-3, "logic": 1e-9, "tolerance": None}


def test_a_handoff_that_fails_is_shown_and_fails_all(capsys: pytest.CaptureFixture[str]) -> None:
    report = replace(REPORT, comparisons=REPORT.comparisons[1:])
    assert agreement_document(result(report))["passed"] is False
    render_agreement(result(report))
    lines = capsys.readouterr().out.splitlines()
    assert "hand-offs: 1 of 2 agree (after 7, 9 tokens); worst 2.0e-09 (float64, eps 0)" in lines
    assert "  7 tokens in parallel, continued in recurrent: 2.0e-09" in lines
    assert lines[-1] == "failed"
