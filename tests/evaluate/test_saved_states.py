"""Two saved states: alike only where every layer, the logits, the tokens and the model are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from retnet_tools.errors import VerificationError
from retnet_tools.evaluate.saved_states import Distance, compare_states, likeliest, state_norms
from retnet_tools.runtime.sampling import Sampling
from retnet_tools.runtime.state_file import StateFile

RNG = np.random.default_rng(5)
STATE = StateFile(
    states=tuple((1e-3 * RNG.standard_normal((2, 3, 4, 5))).astype(np.float32) for _ in range(3)),
    position=np.array([7, 9]),
    logits=RNG.standard_normal((2, 11)).astype(np.float32),
    seen=np.zeros((2, 11), dtype=bool),
    fingerprint={"model": "a", "dtype": "float32"},
    token_hashes=("00" * 32, "11" * 32),
    sampling=Sampling(),
    streams=({}, {}),
)


def with_layer(index: int, factor: float) -> StateFile:
    states = list(STATE.states)
    states[index] = states[index] * np.float32(factor)
    return replace(STATE, states=tuple(states))


def test_a_state_is_itself() -> None:
    found = compare_states(STATE, STATE)
    assert (found.max_rel, found.same_top_1, found.other_fingerprint) == (0.0, 1.0, ())
    found.require(0.0)


@pytest.mark.parametrize("index", range(3))
def test_one_layer_that_is_off_is_relative_to_its_own_size(index: int) -> None:
    """States of order 1e-3: a tenth of one is a tenth, beside logits of order 1 too."""
    found = compare_states(STATE, with_layer(index, 1.1))
    assert found.max_rel == pytest.approx(0.1, rel=1e-5)
    assert [layer.max_rel > 0.09 for layer in found.layers] == [n == index for n in range(3)]
    found.require(0.11)
    with pytest.raises(VerificationError, match=r"a relative difference of 1\.000e-01; expected at most 0\.05"):
        found.require(0.05)


def test_logits_that_are_off_count_too() -> None:
    found = compare_states(STATE, replace(STATE, logits=STATE.logits * np.float32(1.1)))
    assert found.max_rel == pytest.approx(0.1, rel=1e-5)
    assert found.logits.max_abs == pytest.approx(0.1 * np.abs(STATE.logits).max(), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_hashes": ("00" * 32, "22" * 32)}, "different tokens"),
        ({"position": np.array([7, 8])}, "different positions"),
        ({"states": STATE.states[:2]}, "different shapes"),
        ({"fingerprint": {"model": "b", "dtype": "float32"}}, "differ in model"),
        ({"fingerprint": {"model": "a"}}, "differ in dtype"),
    ],
)
def test_what_is_not_of_one_text_and_model_never_passes(change: dict, message: str) -> None:
    other = replace(STATE, **change)
    for pair in ((STATE, other), (other, STATE)):
        with pytest.raises(VerificationError, match=message):
            compare_states(*pair).require(1e9)


def test_a_distance_from_nothing_is_as_it_stands() -> None:
    zeros = np.zeros(3)
    assert Distance.of(zeros, zeros + 0.25) == Distance(0.25, 0.25)


def test_norms_and_likeliest_tokens_follow_their_definitions() -> None:
    norms = [[np.sqrt(sum(float(x) ** 2 for x in layer[row].ravel())) for layer in STATE.states] for row in range(2)]
    np.testing.assert_allclose(state_norms(STATE), norms, rtol=1e-12)
    assert likeliest(np.log(np.array([0.1, 0.4, 0.2, 0.3])), 2) == [(1, pytest.approx(0.4)), (3, pytest.approx(0.3))]
