from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from retnet_tools.config import HeadNorm
from retnet_tools.errors import UsageError, VerificationError
from retnet_tools.model.agreement import compare_forms, prefix_lengths, require_agreement, select_forms
from retnet_tools.model.budgets import ROUNDING_BUDGETS
from retnet_tools.model.retention import FORMS, retention_chunkwise, retention_parallel, retention_recurrent
from retnet_tools.model.retnet import load_model
from tests.helpers import ABLATIONS, BASE, random_source, random_tokens
from tests.model.planted import LARGE_EPSILON, LENGTH, by_pair, compare, eq7, noisy_in_float32, scaled_in_call

each_config = pytest.mark.parametrize("config", ABLATIONS.values(), ids=ABLATIONS)


@each_config
def test_every_configuration_passes_or_shows_its_epsilon(config):
    report = compare(config)
    assert [(c.a, c.b) for c in report.comparisons] == [
        ("parallel", "recurrent"),
        ("parallel", "chunkwise"),
        ("recurrent", "chunkwise"),
    ]
    assert all(c.cause != "logic" and c.exceeded in (None, "normalisation-epsilon") for c in report.comparisons)
    assert by_pair(report)["recurrent", "chunkwise"].passed
    assert report.passed or config.head_norm.eps >= 1e-5
    assert len(report.handoffs) == 4 * 9
    assert all(h.passed for h in report.handoffs)


@pytest.mark.parametrize(
    "zeta", [None, lambda size, j: j + 1, lambda size, j: size - j], ids=["no zeta", "gamma^(j+1)", "gamma^(B-j)"]
)
def test_the_uncorrected_eq_7_is_called_logic(zeta):
    report = compare(forms={"recurrent": retention_recurrent, "chunkwise": retention_chunkwise, "eq7": eq7(zeta)})
    pairs = by_pair(report)
    for other in ("recurrent", "chunkwise"):
        assert pairs[other, "eq7"].cause == "logic"
        assert pairs[other, "eq7"].first_layer == 0
        assert not pairs[other, "eq7"].passed
    assert pairs["recurrent", "chunkwise"].passed
    bad = {(h.prefix_form, h.continue_form) for h in report.handoffs if not h.passed}
    assert ("eq7", "recurrent") in bad
    assert ("recurrent", "chunkwise") not in bad
    with pytest.raises(VerificationError, match=r"eq7 differ by .* \(logic, from layer 0 on\)"):
        require_agreement(report)


def test_eq_7_as_corrected_passes():
    forms = {"recurrent": retention_recurrent, "eq7": eq7(lambda size, j: size - 1 - j)}
    assert compare(forms=forms).passed


def test_an_error_in_the_second_layer_is_found_there():
    wrong = scaled_in_call(1, 1e-3)
    report = compare(forms={"recurrent": retention_recurrent, "wrong": wrong})
    (comparison,) = report.comparisons
    assert (comparison.cause, comparison.first_layer) == ("logic", 1)
    assert comparison.run.layers[0] == 0 < comparison.run.layers[1]


def test_a_handoff_is_judged_by_the_form_that_continues():
    wrong_output_right_state = scaled_in_call(0, 1e-3, layers=1)
    forms = {"recurrent": retention_recurrent, "wrong": wrong_output_right_state}
    config = replace(BASE, num_layers=1)
    report = compare(config, forms=forms)
    assert not report.comparisons[0].passed
    assert all(h.passed for h in report.handoffs)


def test_a_logic_error_far_below_float32_rounding_is_still_logic():
    comparison = compare(forms={"recurrent": retention_recurrent, "wrong": scaled_in_call(0, 1e-8)}).comparisons[0]
    assert comparison.run.max_abs < ROUNDING_BUDGETS["float32"]
    assert (comparison.cause, comparison.passed) == ("logic", False)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("clamp", ["sum_of_abs", "abs_of_sum"])
def test_a_large_head_norm_epsilon_under_a_clamp_is_called_so(clamp, dtype):
    config = replace(LARGE_EPSILON, score_normalization=replace(BASE.score_normalization, clamp=clamp))
    report = compare(config, dtype=dtype)
    pairs = by_pair(report)
    assert pairs["parallel", "recurrent"].cause == "normalisation-epsilon"
    assert pairs["parallel", "recurrent"].exceeded == "normalisation-epsilon"
    assert pairs["recurrent", "chunkwise"].cause == "rounding"
    assert all(h.passed for h in report.handoffs)
    with pytest.raises(VerificationError, match=r"normalisation-epsilon.*decoding follows the recurrent one"):
        require_agreement(report)


def test_a_large_epsilon_without_a_clamp_makes_no_difference():
    config = replace(LARGE_EPSILON, score_normalization=replace(BASE.score_normalization, clamp="none"))
    assert {c.cause for c in compare(config).comparisons} == {"rounding"}


def test_noise_that_float64_does_not_have_is_called_rounding():
    comparison = compare(forms={"recurrent": retention_recurrent, "noisy": noisy_in_float32}).comparisons[0]
    assert (comparison.cause, comparison.exceeded) == ("rounding", "rounding")
    assert comparison.float64.max_abs < 1e-12 < comparison.run.max_abs


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_differ_by_rounding_and_pass(dtype):
    report = compare(dtype=dtype)
    assert {c.cause for c in report.comparisons} == {"rounding"}
    assert report.passed
    assert max(c.run.max_abs for c in report.comparisons) > ROUNDING_BUDGETS["float32"]


def test_a_clamp_that_no_head_norm_cancels_is_logic_and_explained():
    report = compare(replace(BASE, head_norm=HeadNorm("none", 0.0)))
    pairs = by_pair(report)
    assert pairs["parallel", "recurrent"].cause == "logic"
    assert pairs["recurrent", "chunkwise"].passed
    assert "no head norm cancels that" in report.notes[0]


def test_the_numbers_of_a_comparison_follow_their_definitions():
    forms = {"parallel": retention_parallel, "wrong": scaled_in_call(0, 0.5)}
    ids = random_tokens(BASE, 2, LENGTH, 1)
    logits = []
    for form in forms.values():
        with torch.inference_mode():
            model = load_model(BASE, random_source(BASE, 1), torch.float64)
            logits.append(model(torch.from_numpy(ids), form=form).logits.numpy())
    a, b = logits
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in logits)
    difference = compare(forms=forms, dtype="float64").comparisons[0].run
    assert difference.max_abs == pytest.approx(np.abs(a - b).max())
    assert difference.max_rel == pytest.approx(np.abs(a - b).max() / np.abs(a).max())
    assert difference.kl_mean == pytest.approx((p * np.log(p / q)).sum(-1).mean())
    assert difference.top1_agreement == (a.argmax(-1) == b.argmax(-1)).mean() < 1


def test_one_token_has_no_handoffs_and_says_that_one_chunk_was_enough():
    ids = random_tokens(BASE, 1, 1, 1)
    report = compare_forms(BASE, random_source(BASE, 1), ids, select_forms(["recurrent", "chunkwise"], chunk_size=48))
    assert report.passed
    assert report.handoffs == ()
    assert "no chunk boundary" in report.notes[0]


@pytest.mark.parametrize(("tokens", "expected"), [(1, []), (2, [1]), (3, [1, 2]), (256, [1, 85, 128, 255])])
def test_prefixes_are_cut_inside_the_tokens(tokens, expected):
    assert prefix_lengths(tokens) == expected


def test_progress_counts_every_run():
    calls = []
    compare(progress=lambda what, done, total: calls.append((done, total)))
    assert calls == [(n, 10) for n in range(10)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["parallel", "chunkwize"], "unknown form 'chunkwize'.*did you mean 'chunkwise'"),
        (["parallel", "parallel"], "form parallel alone"),
        ([""], "unknown form ''"),
    ],
)
def test_forms_that_cannot_be_compared_are_refused(names, message):
    with pytest.raises(UsageError, match=message):
        select_forms(names, chunk_size=48)


def test_the_chunk_size_reaches_the_chunkwise_form():
    form = select_forms(["chunkwise", "parallel"], chunk_size=5)["chunkwise"]
    assert isinstance(form, partial)
    assert form.keywords == {"chunk_size": 5}
    with pytest.raises(UsageError, match="chunk size 0"):
        select_forms(["chunkwise", "parallel"], chunk_size=0)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([[61]]), "token 61"),
        (np.zeros((1, 0), dtype=np.int64), r"shape \[1, 0\]"),
        (np.zeros(3, dtype=np.int64), r"shape \[3\]"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(ids, message):
    with pytest.raises(UsageError, match=message):
        compare_forms(BASE, random_source(BASE, 1), ids, dict(FORMS))


def test_embeddings_that_do_not_fit_a_stack_are_refused():
    stack = ABLATIONS["stack"]
    for wrong in (np.zeros((1, 4), dtype=np.int64), np.zeros((1, 4, 31)), np.zeros((1, 0, 32))):
        with pytest.raises(UsageError, match=r"expected \[rows, tokens, 32\]"):
            compare_forms(stack, random_source(stack, 1), wrong, dict(FORMS))
