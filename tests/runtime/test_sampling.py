from __future__ import annotations

import numpy as np
import pytest

from retnet_tools.errors import InputError, UsageError
from retnet_tools.runtime.sampling import Candidates, Sampler, Sampling, repetition_penalty
from retnet_tools.weights import Array

LOGITS = np.log(np.array([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]], dtype=np.float32))


def probabilities(logits: Array, sampling: Sampling) -> Array:
    """The distribution that is drawn from, `[B, vocab]`, for a temperature above 0 and no tokens so far."""
    result = np.zeros(logits.shape)
    for row, values in zip(result, logits, strict=True):
        left = sampling.candidates(values, np.zeros(len(values), dtype=bool))
        row[left.ids] = left.weights / left.weights.sum()
    return result


def sampler(sampling: Sampling, rows: int = 2, vocab: int = 4) -> Sampler:
    return Sampler.for_rows(sampling, range(rows), vocab)


def test_temperature_zero_takes_the_most_likely() -> None:
    assert sampler(Sampling()).sample(LOGITS).tolist() == [0, 3]


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
    one = sampler(Sampling(1.0, seed=1))
    draws = [int(one.sample(LOGITS[:1])[0]) for _ in range(4000)]
    shares = np.bincount(draws, minlength=4) / 4000
    # Four standard deviations of a share.
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.15, 0.1], atol=4 * 0.5 / 4000**0.5)


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (np.nextafter(0.5, 0), 1), (0.5, 3), (np.nextafter(1, 0), 3)])
def test_a_draw_takes_the_token_whose_share_of_the_line_holds_the_number(number: float, token: int) -> None:
    """Tokens that cannot be have none, wherever they stand."""

    class Stream:
        def random(self) -> float:
            return number

    logits = np.array([[-1e4, 0.0, -1e4, 0.0, -1e4]])
    one = Sampler(Sampling(1.0), [Stream()], np.zeros((1, 5), dtype=bool))
    assert one.sample(logits).tolist() == [token]


def test_no_two_rows_of_any_seeds_draw_alike() -> None:
    logits = np.zeros((8, 10_000))
    draws = [sampler(Sampling(1.0, seed=seed), rows=8, vocab=10_000).sample(logits).tolist() for seed in range(8)]
    assert len({number for row in draws for number in row}) > 60


def test_the_same_seed_draws_the_same_tokens() -> None:
    def draw(seed: int) -> list[int]:
        one = sampler(Sampling(1.0, seed=seed))
        return [int(one.sample(LOGITS[:1])[0]) for _ in range(50)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_large_logits_do_not_overflow() -> None:
    assert np.isfinite(probabilities(np.array([[1e4, 0.0, -1e4]]), Sampling(0.01))).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(fields)).replace("_", "-")):
        Sampling(**fields)


def test_a_tiny_temperature_is_greedy() -> None:
    assert probabilities(LOGITS, Sampling(1e-320)).argmax(-1).tolist() == [0, 3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(temperature: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        sampler(Sampling(temperature), vocab=2).sample(np.array([[0.0, np.nan]]))


@pytest.mark.parametrize(("min_p", "kept"), [(0.0, 4), (0.25, 4), (0.26, 2), (0.5, 2), (0.6, 1), (1.0, 1)])
def test_min_p_keeps_tokens_of_a_share_of_the_best_ones_probability(min_p: float, kept: int) -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125]]))
    found = probabilities(logits, Sampling(1.0, min_p=min_p))
    assert np.count_nonzero(found) == kept
    assert found.sum() == pytest.approx(1)


def test_a_repetition_penalty_moves_seen_tokens_away_from_being_chosen() -> None:
    logits = np.array([[2.0, 1.5, -1.0, -1.5]])
    one = sampler(Sampling(repetition_penalty=2.0), rows=1)
    assert one.sample(logits).tolist() == [0]
    one.observe(0, [0])
    assert one.sample(logits).tolist() == [1]
    seen = Candidates(np.arange(4), logits[0], np.array([True, False, True, False]))
    np.testing.assert_array_equal(repetition_penalty(seen, 2.0).logits, [1, 1.5, -2, -1.5])
    one.observe(0, np.array([1, 2, 3]))
    assert one.sample(logits).tolist() == [0]


@pytest.mark.parametrize(
    "sampling", [Sampling(0.7, 40, 0.9, 0.02), Sampling(1.3, top_p=0.95), Sampling(1.0, 7), Sampling(2.0)]
)
@pytest.mark.parametrize("vocab", [5, 1000, 50257])
def test_the_distribution_is_that_of_a_plain_sort(sampling: Sampling, vocab: int) -> None:
    logits = np.random.default_rng(vocab).standard_normal(vocab) * 3
    p = np.exp(logits / sampling.temperature)
    order = np.argsort(-p)
    kept = np.zeros(vocab, dtype=bool)
    ranked = order[: sampling.top_k or vocab]
    reached = np.cumsum(p[ranked]) / p[ranked].sum()
    kept[ranked[: int(np.searchsorted(reached, sampling.top_p)) + 1]] = True
    kept &= p >= sampling.min_p * p.max()
    expected = np.where(kept, p, 0) / p[kept].sum()
    np.testing.assert_allclose(probabilities(logits[None], sampling)[0], expected, rtol=1e-9)


def test_equal_tokens_are_kept_in_the_order_of_their_ids() -> None:
    assert np.flatnonzero(probabilities(np.zeros((1, 9)), Sampling(1.0, top_k=3))[0]).tolist() == [0, 1, 2]


def test_the_first_copy_of_a_row_draws_as_the_row_would_and_the_others_apart() -> None:
    logits = np.zeros((2, 1000))
    first, second = sampler(Sampling(1.0), vocab=1000), sampler(Sampling(1.0), vocab=1000)
    forked = second.select([0, 0, 1])
    draws = np.array([forked.sample(np.zeros((3, 1000))) for _ in range(20)])
    expected = np.array([first.sample(logits) for _ in range(20)])
    np.testing.assert_array_equal(draws[:, [0, 2]], expected)
    assert (draws[:, 1] != draws[:, 0]).sum() > 15
    # Copies of copies and of their originals are apart too.
    again = second.select([0, 0, 0]).select([0, 0, 1, 1, 2, 2, 0])
    draws = np.array([again.sample(np.zeros((7, 1000))) for _ in range(20)])
    assert all((draws[:, a] != draws[:, b]).sum() > 15 for a in range(7) for b in range(a))
    # Copies leave the original where it was.
    np.testing.assert_array_equal(np.array([second.sample(logits) for _ in range(20)]), expected)
