from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet_tools.model.retention import FORMS, retention_chunkwise, retention_parallel, retention_recurrent
from retnet_tools.paper import paper_decay
from tests.tolerances import FLOAT32, FLOAT64

B, H, T, K, V = 2, 3, 13, 4, 6
DECAY = torch.tensor(paper_decay(H), dtype=torch.float64)
KEY_DECAY = DECAY[:, None] + torch.tensor([-0.3, -0.01, -2.0, 0.0], dtype=torch.float64)
each_decay = pytest.mark.parametrize("decay", [DECAY, KEY_DECAY], ids=["a head", "a key dimension"])
ALL_FORMS = {**FORMS, **{f"chunks of {n}": partial(retention_chunkwise, chunk_size=n) for n in (1, 2, 3, 7, T, T + 5)}}
each_form = pytest.mark.parametrize("form", ALL_FORMS.values(), ids=ALL_FORMS)


def random_qkv(length=T, seed=0, heads=H, k=K, v=V, batch=B):
    rng = np.random.default_rng(seed)
    return tuple(torch.from_numpy(rng.standard_normal((batch, heads, length, size))) for size in (k, k, v))


def close(a, b, tolerance=FLOAT64):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=tolerance, rtol=0)


def naive_sum(q, k, v, decay, state=None, clamp="none"):
    """o_n = sum_(m<=n) (gamma^(n-m) q_n . k_m) v_m, term by term, and the state sum_m (gamma^(T-1-m) k_m) v_m^T."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    batch, heads, length = q.shape[:3]
    gamma = np.broadcast_to(np.exp(decay.numpy()).reshape(heads, -1), (heads, k.shape[-1]))
    outputs = np.zeros((*q.shape[:3], v.shape[-1]))
    states = np.zeros((batch, heads, k.shape[-1], v.shape[-1]))
    for b in range(batch):
        for h in range(heads):
            start = np.zeros(states.shape[2:]) if state is None else state[b, h].double().numpy()
            for n in range(length):
                scores = [np.dot(gamma[h] ** (n - m) * q[b, h, n], k[b, h, m]) for m in range(n + 1)]
                o = sum(score * v[b, h, m] for m, score in enumerate(scores))
                o = o + (gamma[h] ** (n + 1) * q[b, h, n]) @ start
                divisor = {"none": 1.0, "abs_of_sum": abs(sum(scores)), "sum_of_abs": sum(map(abs, scores))}[clamp]
                outputs[b, h, n] = o / min(max(divisor, 1.0), 5e4)
            terms = [np.outer(gamma[h] ** (length - 1 - m) * k[b, h, m], v[b, h, m]) for m in range(length)]
            states[b, h] = sum(terms) + (gamma[h] ** length)[:, None] * start
    return outputs, states


@each_form
@each_decay
def test_a_form_equals_the_sum_of_eq_5_and_the_state_of_eq_6(form, decay):
    q, k, v = random_qkv()
    output, state = form(q, k, v, decay)
    expected_output, expected_state = naive_sum(q, k, v, decay)
    close(output, expected_output)
    close(state, expected_state)


@each_form
@each_decay
def test_a_form_continues_from_a_state(form, decay):
    q, k, v = random_qkv()
    start = torch.from_numpy(np.random.default_rng(5).standard_normal((B, H, K, V)))
    output, state = form(q, k, v, decay, initial_state=start)
    expected_output, expected_state = naive_sum(q, k, v, decay, start)
    close(output, expected_output)
    close(state, expected_state)


@each_form
def test_one_token_is_an_outer_product(form):
    q, k, v = random_qkv(length=1)
    output, state = form(q, k, v, DECAY)
    close(state[..., :, :], np.einsum("bhtk,bhtv->bhkv", k, v))
    close(output, np.einsum("bhtk,bhkv->bhtv", q, state))


@each_form
def test_a_state_is_not_changed_in_place(form):
    start = torch.ones(B, H, K, V, dtype=torch.float64)
    form(*random_qkv(), DECAY, initial_state=start)
    assert torch.equal(start, torch.ones_like(start))


@pytest.mark.parametrize("split", range(1, T))
@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
def test_prefix_in_one_form_then_the_rest_in_another_equals_the_whole(first, second, split):
    q, k, v = random_qkv()
    whole, final = retention_parallel(q, k, v, DECAY)
    head, state = FORMS[first](*(x[:, :, :split] for x in (q, k, v)), DECAY)
    tail, end = FORMS[second](*(x[:, :, split:] for x in (q, k, v)), DECAY, initial_state=state)
    close(torch.cat((head, tail), 2), whole)
    close(end, final)


@pytest.mark.parametrize("clamp", ["abs_of_sum", "sum_of_abs"])
def test_the_parallel_form_clamps_each_row_of_scores(clamp):
    q, k, v = random_qkv()
    output, state = retention_parallel(q, k, v, DECAY, score_clamp=clamp)
    expected, unclamped_state = naive_sum(q, k, v, DECAY, clamp=clamp)
    close(output, expected)
    close(state, unclamped_state)


@pytest.mark.parametrize("clamp", ["abs_of_sum", "sum_of_abs"])
def test_gradients_take_the_clamp_for_a_constant(clamp):
    """As torchscale's `detach` does."""
    q, k, v = (x.requires_grad_() for x in random_qkv())
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal((B, H, T, V)))
    with torch.no_grad():
        clamped, _ = retention_parallel(q, k, v, DECAY, score_clamp=clamp)
        divisor = (retention_recurrent(q, k, v, DECAY)[0] / clamped).median(-1, keepdim=True).values
    assert float(divisor.max()) > 2
    found = torch.autograd.grad((retention_parallel(q, k, v, DECAY, score_clamp=clamp)[0] * weight).sum(), (q, k, v))
    expected = torch.autograd.grad((retention_recurrent(q, k, v, DECAY)[0] / divisor * weight).sum(), (q, k, v))
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-9)


def test_the_sum_of_absolutes_is_clamped_from_above():
    q, k, v = random_qkv()
    output, _ = retention_parallel(1e4 * q, 1e4 * k, v, DECAY, score_clamp="sum_of_abs")
    expected, _ = naive_sum(1e4 * q, 1e4 * k, v, DECAY, clamp="sum_of_abs")
    np.testing.assert_allclose(output, expected, rtol=FLOAT64)


@pytest.mark.parametrize("form", [retention_recurrent, retention_chunkwise])
def test_forms_without_all_scores_leave_the_clamp_out(form):
    q, k, v = random_qkv()
    close(form(q, k, v, DECAY, score_clamp="sum_of_abs")[0], form(q, k, v, DECAY)[0])


@each_form
def test_later_tokens_do_not_change_earlier_outputs(form):
    q, k, v = random_qkv()
    before, _ = form(q, k, v, DECAY)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, 8:] = 100.0
    after, _ = form(*changed, DECAY)
    close(before[:, :, :8], after[:, :, :8])


@each_form
def test_rows_of_a_batch_are_independent(form):
    q, k, v = random_qkv()
    together, states = form(q, k, v, DECAY)
    alone, state = form(q[1:], k[1:], v[1:], DECAY)
    close(together[1:], alone)
    close(states[1:], state)


@each_form
def test_a_strong_decay_of_one_key_dimension_over_a_long_distance_stays_finite(form):
    q, k, v = (x.float() for x in random_qkv(length=120))
    decay = torch.tensor([[-30.0, -1e-3, -0.1, -5.0]] * H, dtype=torch.float64)
    output, state = form(q, k, v, decay)
    expected_output, expected_state = naive_sum(q, k, v, decay)
    close(output, expected_output, FLOAT32)
    close(state, expected_state, FLOAT32)


@each_form
def test_float32_stays_float32_and_near_the_exact_sum(form):
    q, k, v = (x.float() for x in random_qkv(length=40, seed=3))
    output, state = form(q, k, v, DECAY)
    expected_output, expected_state = naive_sum(q, k, v, DECAY)
    assert output.dtype == state.dtype == torch.float32
    close(output, expected_output, FLOAT32)
    close(state, expected_state, FLOAT32)


@each_form
@pytest.mark.parametrize("log_gamma", [0.0, -80.0], ids=["no decay", "no memory"])
def test_the_limits_of_decay(form, log_gamma):
    q, k, v = random_qkv()
    decay = torch.full((H,), log_gamma, dtype=torch.float64)
    output, _ = form(q, k, v, decay)
    close(output, naive_sum(q, k, v, decay)[0])


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 20),
    heads=st.integers(1, 4),
    k=st.integers(1, 5).map(lambda n: 2 * n),
    v=st.integers(1, 9),
    batch=st.integers(1, 3),
    chunk=st.integers(1, 25),
    gammas=st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4),
    carried=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_forms_agree_for_any_shape(length, heads, k, v, batch, chunk, gammas, carried, seed):
    qkv = random_qkv(length, seed, heads, k, v, batch)
    decay = torch.tensor(gammas[:heads], dtype=torch.float64).log()
    start = torch.from_numpy(np.random.default_rng(seed).standard_normal((batch, heads, k, v))) if carried else None
    forms = (retention_parallel, retention_recurrent, partial(retention_chunkwise, chunk_size=chunk))
    (output, state), *others = (form(*qkv, decay, initial_state=start) for form in forms)
    for other_output, other_state in others:
        close(other_output, output)
        close(other_state, state)


def test_a_chunk_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="chunk_size is 0"):
        retention_chunkwise(*random_qkv(), DECAY, chunk_size=0)
