"""The float64 reference of exports against a RetNet written apart, and what its noisy copies stand for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from retnet_tools.model.noise import Noise, NoisyCopies
from retnet_tools.model.reference import Walk, expected_runs
from retnet_tools.model.retention import retention_recurrent
from retnet_tools.model.retnet import load_model
from retnet_tools.progress import no_progress
from tests.helpers import ABLATIONS, BASE, random_source, random_tokens
from tests.reference import reference_logits
from tests.tolerances import FLOAT64, LOGITS_FLOAT64

FLOATS = Noise(1e-6, 0.0, 0.0, {})


def run(config, source, walk, noises=(), **options):
    return expected_runs(config, source, [walk], noises, no_progress, **options)[0]


@pytest.mark.parametrize("name", ["base", "tied", "stack", "key_decay", "head_bias", "torchscale_2023", "output_norm"])
def test_logits_are_those_of_a_model_written_apart(name):
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], 1)
    tokens = random_tokens(config, 2, 40, 2)
    found = run(config, source, Walk(tokens, np.array([0, 0]), (3, 40)), [FLOATS])
    np.testing.assert_allclose(found.logits, reference_logits(config, source, tokens), rtol=0, atol=LOGITS_FLOAT64)


def test_states_go_on_from_any_state_at_positions_of_each_row():
    source, tokens, position = random_source(BASE, 3), random_tokens(BASE, 2, 12, 4), np.array([5, 70])
    begin = [np.random.default_rng(5).standard_normal((2, 4, 8, 12)) for _ in range(BASE.num_layers)]
    found = run(BASE, source, Walk(tokens, position, (7,), begin), [FLOATS])
    model = load_model(BASE, source, torch.float64)
    with torch.inference_mode():
        expected = model(
            torch.from_numpy(tokens[:, :7]),
            form=retention_recurrent,
            states=[torch.from_numpy(state) for state in begin],
            position=torch.from_numpy(position),
        )
    for state, own in zip(found.states[7], expected.states, strict=True):
        np.testing.assert_allclose(state, own.numpy(), rtol=2e-7, atol=1e-7)
    np.testing.assert_allclose(found.logits[:, :7], expected.logits.numpy(), rtol=0, atol=LOGITS_FLOAT64)


def test_copies_move_as_far_as_their_noise():
    source, walk = random_source(BASE, 6), Walk(random_tokens(BASE, 1, 20, 7), np.array([0]), (20,))
    small, large = (run(BASE, source, walk, [replace(FLOATS, relative=size)]) for size in (1e-7, 1e-6))
    ratio = large.logits_apart[0] / small.logits_apart[0]
    np.testing.assert_allclose(ratio, 10, rtol=0.05)
    np.testing.assert_allclose(large.states_apart[20][1][0] / small.states_apart[20][1][0], 10, rtol=0.05)
    assert run(BASE, source, walk, [replace(FLOATS, relative=0.0)]).logits_apart[0].max() < LOGITS_FLOAT64


def test_each_noise_has_its_own_copies():
    source, walk = random_source(BASE, 8), Walk(random_tokens(BASE, 1, 20, 9), np.array([0]), (20,))
    matrices = {name: 32 for name in source.names() if name.endswith("proj.weight") or name == "lm_head.weight"}
    nothing = Noise(0.0, 0.0, 0.0, {})
    noises = [nothing, Noise(0.0, 0.0, 1.0, matrices), replace(nothing, state=1e-3)]
    found = run(BASE, source, walk, noises, copies=2)
    none, int8, written = found.logits_apart
    # Copies are rows of one product, whose sums need not be taken in one order.
    assert none.max() < LOGITS_FLOAT64
    assert (int8 > 1e-3).all()
    # The first token is read before any state is written.
    assert written[0, 0] < LOGITS_FLOAT64 < 1e-6 < written[0, 5:].min()
    np.testing.assert_allclose(found.logits, reference_logits(BASE, source, walk.tokens), rtol=0, atol=LOGITS_FLOAT64)


def test_int8_is_moved_by_the_step_of_each_block():
    noisy = NoisyCopies([Noise(0.0, 0.0, 1.0, {"matrix": 32})], 1, seed=0)
    x = torch.cat([torch.ones(2, 3, 32), 100 * torch.ones(2, 3, 8)], -1).double()
    own, moved = noisy.read("matrix", x)
    assert (own == x[0]).all()
    apart = (moved - x[1]).abs()
    assert 0.1 / 127 < apart[:, :32].mean() < 2 / 127
    assert 10 / 127 < apart[:, 32:].mean() < 200 / 127
    assert noisy.read("another", x) is x


def test_a_vector_of_zeros_stays_zero_but_for_the_absolute_part():
    noisy = NoisyCopies([Noise(1e-3, 0.0, 0.0, {}), Noise(0.0, 1e-3, 0.0, {})], 1, seed=0)
    still, relative, absolute = noisy.moved(torch.zeros(3, 1, 64, dtype=torch.float64))
    assert still.abs().max() == relative.abs().max() == 0
    assert absolute.square().mean().sqrt().item() == pytest.approx(1e-3, rel=0.5)
    assert FLOAT64 < 1e-3
