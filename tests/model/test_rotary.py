import numpy as np
import pytest
import torch

from retnet_tools.model.position_terms import rotary_phases, rotate
from retnet_tools.paper import paper_rotary_frequencies
from tests.tolerances import FLOAT32_PHASE, FLOAT64

FREQUENCIES = paper_rotary_frequencies(8)


def turned(x: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return rotate(x, *rotary_phases(positions, FREQUENCIES, dtype))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def test_rotation_is_multiplication_by_complex_phases():
    x = random(2, 3, 5, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]])
    z = x.numpy()[..., 0::2] + 1j * x.numpy()[..., 1::2]
    z = z * np.exp(1j * positions.numpy()[:, None, :, None] * np.array(FREQUENCIES))
    expected = np.stack((z.real, z.imag), -1).reshape(x.shape)
    np.testing.assert_allclose(turned(x, positions).numpy(), expected, atol=FLOAT64, rtol=0)


def test_each_head_may_have_frequencies_of_its_own():
    x, positions = random(2, 3, 5, 8), torch.tensor([[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]])
    own = paper_rotary_frequencies(24)
    y = rotate(x, *rotary_phases(positions, own, torch.float64, heads=3))
    for head in range(3):
        phases = rotary_phases(positions, own[4 * head : 4 * head + 4], torch.float64)
        torch.testing.assert_close(y[:, head], rotate(x, *phases)[:, head], atol=FLOAT64, rtol=0)


def test_position_zero_changes_nothing():
    x = random(1, 2, 1, 8)
    assert torch.equal(turned(x, torch.tensor([[0]])), x)


def test_rotation_keeps_the_length_of_each_pair():
    x = random(1, 1, 4, 8)
    y = turned(x, torch.tensor([[3, 100, 5000, 70000]]))
    lengths = [t.unflatten(-1, (-1, 2)).norm(dim=-1) for t in (x, y)]
    torch.testing.assert_close(*lengths, atol=FLOAT64, rtol=0)


@pytest.mark.parametrize("shift", [1, 17, 4096])
def test_scores_depend_on_the_distance_of_positions_only(shift):
    q, k = random(1, 1, 6, 8, seed=1), random(1, 1, 6, 8, seed=2)
    at = torch.arange(6)[None]
    here = turned(q, at) @ turned(k, at).transpose(-1, -2)
    there = turned(q, at + shift) @ turned(k, at + shift).transpose(-1, -2)
    torch.testing.assert_close(here, there, atol=FLOAT64, rtol=0)


@pytest.mark.parametrize("position", [1, 8191, 2**24 + 1])
def test_float32_phases_are_exact_at_long_positions(position):
    cos, sin = rotary_phases(torch.tensor([[position]]), FREQUENCIES, torch.float32)
    angles = np.longdouble(position) * np.array(FREQUENCIES, dtype=np.longdouble)
    assert cos.dtype == sin.dtype == torch.float32
    np.testing.assert_allclose(cos[0, 0, 0].numpy(), np.cos(angles).astype(float), atol=FLOAT32_PHASE, rtol=0)
    np.testing.assert_allclose(sin[0, 0, 0].numpy(), np.sin(angles).astype(float), atol=FLOAT32_PHASE, rtol=0)
