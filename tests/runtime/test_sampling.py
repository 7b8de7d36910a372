from __future__ import annotations

import numpy as np
import pytest

from retnet_tools.errors import InputError, UsageError
from retnet_tools.runtime.sampling import Sampler, Sampling, probabilities

LOGITS = np.log(np.array([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]], dtype=np.float32))


def test_temperature_zero_takes_the_most_likely() -> None:
    assert Sampler(Sampling()).sample(LOGITS).tolist() == [0, 3]


def test_temperature_one_is_the_softmax() -> None:
    np.testing.assert_allclose(probabilities(LOGITS, Sampling(1.0)), np.exp(LOGITS), rtol=1e-6)


def test_temperature_sharpens_and_flattens() -> None:
    expected = np.exp(LOGITS.astype(np.float64)) ** 2
    np.testing.assert_allclose(
        probabilities(LOGITS, Sampling(0.5)), expected / expected.sum(-1, keepdims=True), rtol=1e-6
    )


def test_top_k_keeps_the_k_most_likely() -> None:
    expected = [[2 / 3, 1 / 3, 0, 0], [0, 0, 3 / 7, 4 / 7]]
    np.testing.assert_allclose(probabilities(LOGITS, Sampling(1.0, top_k=2)), expected, rtol=1e-6)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.6, 2), (0.75, 2), (0.8, 3), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: int) -> None:
    # Probabilities that are exact in float64, so that the boundary is too.
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125]]))
    assert np.count_nonzero(probabilities(logits, Sampling(1.0, top_p=top_p))) == kept


def test_a_tiny_top_p_still_keeps_one() -> None:
    assert (probabilities(LOGITS, Sampling(1.0, top_p=1e-9)).max(-1) == 1).all()


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(Sampling(1.0, seed=1))
    draws = [int(sampler.sample(LOGITS[:1])[0]) for _ in range(4000)]
    shares = np.bincount(draws, minlength=4) / 4000
    # Four standard deviations of a share.
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.15, 0.1], atol=4 * 0.5 / 4000**0.5)


def test_the_same_seed_draws_the_same_tokens() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(1.0, seed=seed))
        return [int(sampler.sample(LOGITS[:1])[0]) for _ in range(50)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_large_logits_do_not_overflow() -> None:
    assert np.isfinite(probabilities(np.array([[1e4, 0.0, -1e4]]), Sampling(0.01))).all()


@pytest.mark.parametrize(
    "fields", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_values_out_of_range_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(fields)).replace("_", "-")):
        Sampling(**fields)


def test_a_tiny_temperature_is_greedy() -> None:
    assert probabilities(LOGITS, Sampling(1e-320)).argmax(-1).tolist() == [0, 3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(temperature: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        Sampler(Sampling(temperature)).sample(np.array([[0.0, np.nan]]))
