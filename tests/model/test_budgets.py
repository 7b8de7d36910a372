import pytest

from retnet_tools.errors import UsageError, VerificationError
from retnet_tools.model.agreement import compare_forms, require_agreement, select_forms
from retnet_tools.model.budgets import EPSILON_BUDGET, ROUNDING_BUDGETS, Budget
from retnet_tools.model.retention import FORMS, retention_recurrent
from tests.helpers import BASE, MemorySource, random_source, random_tokens
from tests.model.planted import LARGE_EPSILON, compare, eq7


def test_a_tolerance_replaces_the_budgets_of_rounding_and_epsilon():
    assert compare(LARGE_EPSILON, tolerance=10.0).passed
    strict = compare(tolerance=1e-12)
    assert not strict.passed
    with pytest.raises(VerificationError, match="expected at most 1e-12"):
        require_agreement(strict)


def test_no_tolerance_covers_logic():
    wrong = {"recurrent": retention_recurrent, "eq7": eq7(None)}
    report = compare(forms=wrong, tolerance=1e9)
    assert [(c.cause, c.exceeded) for c in report.comparisons] == [("logic", "logic")]
    assert {(h.prefix_form, h.continue_form) for h in report.handoffs if not h.passed} >= {("eq7", "recurrent")}
    with pytest.raises(VerificationError, match=r"\(logic.*; expected at most 1\.0e-09 of this cause"):
        require_agreement(report)


def test_no_tolerance_covers_a_handoff():
    def forgetful(*arguments, initial_state=None, **keywords):
        return retention_recurrent(*arguments, **keywords)

    report = compare(forms={"recurrent": retention_recurrent, "forgetful": forgetful}, tolerance=1e9)
    assert all(c.passed for c in report.comparisons)
    assert {h.continue_form for h in report.handoffs if not h.passed} == {"forgetful"}
    with pytest.raises(VerificationError, match=r"continued in forgetful.*at most 1\.0e-09"):
        require_agreement(report)


NAN = float("nan")
LIMITS = Budget(rounding=1e-4, epsilon=1e-3, logic=1e-9, tolerance=None)


@pytest.mark.parametrize(
    ("d", "d64", "d0", "exceeded"),
    [
        (0.0, 0.0, 0.0, None),
        (1e-4, 0.0, 0.0, None),
        (1.01e-4, 0.0, 0.0, "rounding"),
        (NAN, 0.0, 0.0, "rounding"),
        (1e-3, 1e-3, 0.0, None),
        (1.09e-3, 1e-3, 0.0, None),
        (1.2e-3, 1e-3, 0.0, "rounding"),
        (1.2e-3, 1.01e-3, 0.0, "normalisation-epsilon"),
        (0.0, 1.01e-3, 0.0, "normalisation-epsilon"),
        (0.0, NAN, 0.0, "normalisation-epsilon"),
        (1e-9, 1e-9, 1e-9, None),
        (1.01e-9, 1.01e-9, 1.01e-9, "logic"),
        (0.0, 0.0, 1.01e-9, "logic"),
        (1.0, 1.0, NAN, "logic"),
    ],
)
def test_every_part_of_a_difference_has_a_limit_of_its_own(d, d64, d0, exceeded):
    assert LIMITS.exceeded(d, d64, d0) == exceeded


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf")])
def test_a_tolerance_that_is_no_limit_is_refused(tolerance):
    with pytest.raises(UsageError, match="tolerance"):
        compare(tolerance=tolerance)


def test_budgets_grow_with_logits_beyond_ten_up_to_a_cap():
    assert Budget.of("float32", 5.0, None).rounding == ROUNDING_BUDGETS["float32"]
    assert Budget.of("float32", 50.0, None).rounding == pytest.approx(5 * ROUNDING_BUDGETS["float32"])
    assert Budget.of("float32", float("nan"), None).rounding == ROUNDING_BUDGETS["float32"]
    huge = Budget.of("float32", 1e6, None)
    assert huge.rounding == pytest.approx(10 * ROUNDING_BUDGETS["float32"])
    assert huge.epsilon == pytest.approx(10 * EPSILON_BUDGET)


def test_correct_forms_with_huge_logits_are_not_called_logic():
    tensors = dict(random_source(BASE, 1).tensors)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 1e7
    report = compare_forms(
        BASE, MemorySource(tensors), random_tokens(BASE, 1, 8, 1), select_forms(FORMS, chunk_size=48)
    )
    assert report.logits_scale > 1e7
    assert {c.cause for c in report.comparisons} <= {"rounding", "normalisation-epsilon"}
    assert not report.passed
    assert all(h.passed for h in report.handoffs)
