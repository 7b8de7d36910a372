import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from retnet_tools.model.position_terms import decay_matrix, decay_sums, gamma_powers
from retnet_tools.paper import paper_decay
from tests.tolerances import FLOAT64

HEADS = 8
DECAY = torch.tensor(paper_decay(HEADS), dtype=torch.float64)
GAMMAS = [1 - Fraction(1, 2 ** (5 + h)) for h in range(HEADS)]


def test_gamma_powers_equal_exact_fractions():
    exponents = [0, 1, 2, 63, 500]
    powers = gamma_powers(DECAY, torch.tensor(exponents), torch.float64)
    expected = [[float(gamma**n) for n in exponents] for gamma in GAMMAS]
    np.testing.assert_allclose(powers.numpy(), expected, rtol=FLOAT64)


def test_decay_matrix_is_gamma_to_the_distance_below_the_diagonal():
    length = 7
    expected = np.zeros((HEADS, length, length))
    for h, gamma in enumerate(GAMMAS):
        for n in range(length):
            for m in range(n + 1):
                expected[h, n, m] = float(gamma ** (n - m))
    np.testing.assert_allclose(decay_matrix(DECAY, length, torch.float64).numpy(), expected, rtol=FLOAT64)


def test_decay_sums_equal_exact_sums_at_positions_of_each_row():
    positions = [[0, 1, 2], [40, 41, 300]]
    sums = decay_sums(DECAY, torch.tensor(positions), torch.float64)
    assert sums.shape == (2, HEADS, 3, 1)
    for b, row in enumerate(positions):
        for h, gamma in enumerate(GAMMAS):
            for t, n in enumerate(row):
                exact = float((1 - gamma ** (n + 1)) / (1 - gamma))
                assert sums[b, h, t, 0].item() == pytest.approx(exact, rel=FLOAT64)


def test_sums_without_decay_count_the_positions():
    sums = decay_sums(torch.zeros(2, dtype=torch.float64), torch.tensor([[0, 1, 99]]), torch.float64)
    assert sums[0, :, :, 0].tolist() == [[1, 2, 100]] * 2


def test_sums_equal_the_row_sums_of_the_decay_matrix():
    rows = decay_matrix(DECAY, 33, torch.float64).sum(-1)
    sums = decay_sums(DECAY, torch.arange(33)[None], torch.float64)[0, :, :, 0]
    torch.testing.assert_close(sums, rows, rtol=FLOAT64, atol=0)


def test_a_gamma_near_one_keeps_its_decay_in_float32():
    decay = torch.tensor([math.log1p(-(2.0**-20))], dtype=torch.float64)
    power = gamma_powers(decay, torch.tensor([2**20]), torch.float32).item()
    assert power == pytest.approx(math.exp(-1), rel=1e-5)


def test_a_strong_decay_over_a_long_distance_is_zero_and_not_nan():
    matrix = decay_matrix(torch.tensor([-50.0], dtype=torch.float64), 40, torch.float32)
    assert torch.equal(matrix.isfinite(), torch.ones_like(matrix, dtype=torch.bool))
    assert matrix[0, 39, 0] == 0
    assert matrix[0, 39, 39] == 1
