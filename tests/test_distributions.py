"""Distributions against arithmetic of 60 digits."""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
import pytest

from retnet_tools.distributions import compare_logits, kl_divergence, log_softmax, mean_kl, token_nll
from retnet_tools.weights import Array


def exact_log_softmax(logits: Array) -> list[Decimal]:
    values = [Decimal(float(z)) for z in logits]
    with localcontext(prec=60):
        total = sum(z.exp() for z in values).ln()
        return [z - total for z in values]


def exact_kl(p: Array, q: Array) -> float:
    with localcontext(prec=60):
        log_p, log_q = exact_log_softmax(p), exact_log_softmax(q)
        return float(sum(a.exp() * (a - b) for a, b in zip(log_p, log_q, strict=True)))


def random_logits(seed: int, *shape: int, scale: float = 3.0) -> Array:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("scale", [0.1, 3.0, 300.0])
def test_log_softmax_is_exact_to_float64(scale: float) -> None:
    logits = random_logits(1, 4, 50, scale=scale)
    expected = [[float(x) for x in exact_log_softmax(row)] for row in logits]
    np.testing.assert_allclose(log_softmax(logits), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e-3, 1.0, 30.0])
def test_kl_keeps_its_digits_from_tiny_to_large(scale: float) -> None:
    p = random_logits(2, 6, 40).astype(np.float64)
    q = p + scale * np.random.default_rng(3).standard_normal(p.shape)
    expected = [exact_kl(a, b) for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(kl_divergence(log_softmax(p), log_softmax(q)), expected, rtol=2e-5)
    assert min(expected) > 0


def test_kl_of_disjoint_distributions_is_finite_and_of_a_distribution_with_itself_is_zero() -> None:
    p, q = np.full((1, 5), -2000.0), np.full((1, 5), -2000.0)
    p[0, 1], q[0, 3] = 2000.0, 2000.0
    np.testing.assert_allclose(kl_divergence(log_softmax(p), log_softmax(q)), [4000.0], rtol=1e-12)
    logits = random_logits(4, 30, 100)
    assert (kl_divergence(log_softmax(logits), log_softmax(logits)) == 0).all()


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    logits = random_logits(5, 10, 64).astype(np.float64)
    assert mean_kl(logits, logits + 17.0) < 1e-28


def test_comparing_logits_block_by_block_gives_every_token_its_own_figures() -> None:
    # 300 rows of 2000 make three blocks.
    p, q = random_logits(6, 300, 2000), random_logits(7, 300, 2000)
    tokens = np.random.default_rng(8).integers(0, 2000, 300)
    found = compare_logits(p, q, tokens)
    for i in (0, 130, 131, 299):
        log_p, log_q = exact_log_softmax(p[i]), exact_log_softmax(q[i])
        assert found.baseline_nll[i] == pytest.approx(-float(log_p[tokens[i]]), rel=1e-13)
        assert found.nll[i] == pytest.approx(-float(log_q[tokens[i]]), rel=1e-13)
        assert found.kl[i] == pytest.approx(exact_kl(p[i], q[i]), rel=1e-12)
        assert found.delta_p[i] == pytest.approx(float(log_q[tokens[i]].exp() - log_p[tokens[i]].exp()), abs=1e-15)
    assert (found.same_top == [int(np.argmax(a)) == int(np.argmax(b)) for a, b in zip(p, q, strict=True)]).all()
    np.testing.assert_array_equal(token_nll(q, tokens), found.nll)
    assert mean_kl(p.reshape(3, 100, 2000), q.reshape(3, 100, 2000)) == pytest.approx(found.kl.mean(), rel=1e-13)


def test_kl_has_a_direction() -> None:
    p, q = random_logits(9, 1, 20), random_logits(10, 1, 20)
    forward, back = exact_kl(p[0], q[0]), exact_kl(q[0], p[0])
    assert abs(forward - back) > 0.1
    assert compare_logits(p, q, np.array([0])).kl[0] == pytest.approx(forward, rel=1e-12)


def test_no_tokens_are_no_figures() -> None:
    nothing = np.zeros((0, 7), np.float32)
    assert len(token_nll(nothing, np.zeros(0, np.int64))) == 0
    assert len(compare_logits(nothing, nothing, np.zeros(0, np.int64)).kl) == 0
