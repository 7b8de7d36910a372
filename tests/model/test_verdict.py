"""What a report of agreement says of its parts: one of them that fails is a report that fails, wherever it stands."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from retnet_tools.errors import VerificationError
from retnet_tools.model.agreement import AgreementReport, Comparison, Handoff, require_agreement
from retnet_tools.model.budgets import Budget
from retnet_tools.model.retention import retention_recurrent
from retnet_tools.model.runs import Difference
from tests.model.planted import compare, noisy_in_float32

BUDGET = Budget.of("float32", 1.0, None)
NAMES = ("parallel", "recurrent", "chunkwise")


def difference(max_abs: float) -> Difference:
    return Difference(max_abs, max_abs, 0.0, 1.0, (max_abs,), None)


def comparison(a: str, b: str, run: float = 1e-6, logic: float = 0.0) -> Comparison:
    exact = difference(logic)
    exceeded = BUDGET.exceeded(run, logic, logic)
    return Comparison(a, b, difference(run), exact, exact, exceeded or "rounding", exceeded)


def handoff(a: str, b: str, max_abs: float = 0.0) -> Handoff:
    return Handoff(a, b, 7, max_abs, max_abs <= BUDGET.logic)


HEALTHY = AgreementReport(
    dtype="float32",
    rows=1,
    tokens=30,
    logits_scale=1.0,
    budget=BUDGET,
    comparisons=tuple(comparison(a, b) for a, b in (NAMES[:2], NAMES[::2], NAMES[1:])),
    handoffs=tuple(handoff(a, b) for a in NAMES for b in NAMES),
    notes=(),
)


def test_a_report_passes_where_all_of_it_does() -> None:
    assert HEALTHY.passed
    require_agreement(HEALTHY)


@pytest.mark.parametrize("place", range(3))
def test_one_comparison_over_its_budget_fails_the_report(place: int) -> None:
    rows = list(HEALTHY.comparisons)
    rows[place] = comparison(rows[place].a, rows[place].b, run=2e-4)
    report = replace(HEALTHY, comparisons=tuple(rows))
    assert not report.passed
    with pytest.raises(VerificationError, match=rf"{rows[place].a} and {rows[place].b} differ by 2\.0e-04"):
        require_agreement(report)


@pytest.mark.parametrize("apart", [2e-9, 1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("place", range(9))
def test_one_handoff_over_its_budget_fails_the_report(place: int, apart: float) -> None:
    rows = list(HEALTHY.handoffs)
    rows[place] = handoff(rows[place].prefix_form, rows[place].continue_form, apart)
    report = replace(HEALTHY, handoffs=tuple(rows))
    assert not report.passed
    words = f"7 tokens in {rows[place].prefix_form}, continued in {rows[place].continue_form}, differ by"
    with pytest.raises(VerificationError, match=words):
        require_agreement(report)


def test_the_worst_is_named_and_logic_before_anything_else() -> None:
    rows = [comparison("a", "b", run=2e-4), comparison("b", "c", run=3e-4), comparison("a", "c", run=2.5e-4)]
    with pytest.raises(VerificationError, match=r"b and c differ by 3\.0e-04 .*\(rounding"):
        require_agreement(replace(HEALTHY, comparisons=tuple(rows)))
    rows.append(comparison("c", "d", run=1e-8, logic=1e-8))
    with pytest.raises(VerificationError, match=r"c and d differ by 1\.0e-08 .*\(logic"):
        require_agreement(replace(HEALTHY, comparisons=tuple(rows)))


@pytest.mark.parametrize("factor", [1 + 1e-7, float("nan")])
def test_a_handoff_has_the_budget_of_logic_and_has_to_be_a_number(factor: float) -> None:
    def forgetful(*arguments, initial_state=None, **keywords):
        start = None if initial_state is None else factor * initial_state
        return retention_recurrent(*arguments, initial_state=start, **keywords)

    report = compare(forms={"recurrent": retention_recurrent, "forgetful": forgetful})
    assert all(c.passed for c in report.comparisons)
    assert {h.passed for h in report.handoffs if h.continue_form == "forgetful"} == {False}
    assert {h.passed for h in report.handoffs if h.continue_form == "recurrent"} == {True}
    assert not report.passed


def test_every_row_of_a_batch_is_compared() -> None:
    def noisy_in_the_second_row(*arguments, **keywords):
        output, state = retention_recurrent(*arguments, **keywords)
        noisy, _ = noisy_in_float32(*arguments, **keywords)
        return torch.cat((output[:1], noisy[1:])), state

    report = compare(forms={"recurrent": retention_recurrent, "noisy": noisy_in_the_second_row})
    assert [c.exceeded for c in report.comparisons] == ["rounding"]
