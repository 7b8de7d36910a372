import numpy as np
import pytest
import torch

from retnet_tools.errors import InputError
from retnet_tools.model.agreement import compare_forms
from retnet_tools.model.retention import FORMS, retention_recurrent
from retnet_tools.model.runs import max_abs_difference
from tests.helpers import BASE, MemorySource, random_source, random_tokens
from tests.model.planted import compare


def test_logits_that_are_not_finite_do_not_pass():
    tensors = dict(random_source(BASE, 1).tensors)
    tensors["layers.0.retention.v_proj.weight"] = tensors["layers.0.retention.v_proj.weight"] * 1e6
    ids = random_tokens(BASE, 1, 8, 1)
    report = compare_forms(BASE, MemorySource(tensors), ids, dict(FORMS), dtype="float16")
    assert not report.passed
    assert any("not finite in float16" in note for note in report.notes)
    assert {c.cause for c in report.comparisons} == {"rounding"}
    assert {c.run.top1_agreement for c in report.comparisons} == {0.0}
    assert all(h.passed for h in report.handoffs)


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (np.inf, "float64"), (-np.inf, "bfloat16")])
def test_weights_that_are_not_finite_are_refused_by_name(value, dtype):
    tensors = dict(random_source(BASE, 1).tensors)
    name = "layers.1.ffn.down_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, :2] = value
    with pytest.raises(
        InputError, match=f"tensor '{name}' holds 2 NaN or infinite values; expected finite weights; in"
    ):
        compare_forms(BASE, MemorySource(tensors), random_tokens(BASE, 1, 8, 1), dict(FORMS), dtype=dtype)


def test_logits_that_are_not_finite_in_float64_are_the_fault_of_the_weights():
    tensors = random_source(BASE, 1, np.float64).tensors
    head = tensors["lm_head.weight"]
    tensors["lm_head.weight"] = head / np.abs(head).max() * 1.5e308
    for names in (("parallel", "recurrent", "chunkwise"), ("recurrent", "parallel")):
        with pytest.raises(InputError, match=f"{' and '.join(names)} give logits that are not finite in floa"):
            compare_forms(
                BASE, MemorySource(tensors), random_tokens(BASE, 1, 8, 1), {name: FORMS[name] for name in names}
            )


def test_one_form_that_alone_is_not_finite_is_logic():
    def broken(*arguments, **keywords):
        output, state = retention_recurrent(*arguments, **keywords)
        return output / 0, state

    report = compare(forms={"recurrent": retention_recurrent, "broken": broken})
    assert (report.comparisons[0].cause, report.comparisons[0].exceeded) == ("logic", "logic")
    assert report.comparisons[0].run.top1_agreement == 0
    assert report.comparisons[0].first_layer == 0
    assert [n for n in report.notes if "broken form gives logits that are not finite in float64" in n]


def test_a_difference_of_half_types_is_not_rounded_to_them():
    a, b = (torch.tensor([[1.0, x]], dtype=torch.float16) for x in (6e4, -6e4))
    assert max_abs_difference(a, b) == 1.2e5
    assert max_abs_difference(a / 32, a * 0 - 1) == 1876
