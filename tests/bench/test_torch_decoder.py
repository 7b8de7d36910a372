"""Torch one token at a time is the numpy recurrence, from the start and from a placed state."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retnet_tools.bench.torch_decoder import RecurrentDecoder, reference_logits
from retnet_tools.errors import UsageError
from retnet_tools.model.retention import retention_recurrent
from retnet_tools.model.retnet import load_model
from tests import reference
from tests.helpers import ABLATIONS, random_source, random_tokens
from tests.tolerances import FLOAT64, GRAPH_FLOAT32, LOGITS_FLOAT64

WITH_VOCABULARY = [name for name, config in ABLATIONS.items() if config.has_vocabulary]


@pytest.mark.parametrize("name", WITH_VOCABULARY)
def test_the_reference_of_one_token_goes_on_from_a_state_as_the_recurrence_does(name: str) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], 5, np.float64)
    ids = random_tokens(config, 2, 9, 6)
    with torch.inference_mode():
        model = load_model(config, source, torch.float64)
        states = model(torch.from_numpy(ids[:, :-1]), form=retention_recurrent).states
    logits = reference_logits(config, source, ids[:, -1], [s.numpy() for s in states], np.array([8, 8]))
    assert logits.dtype == np.float64
    expected = reference.reference_logits(config, source, ids)[:, -1]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=LOGITS_FLOAT64)


def test_rows_stand_at_positions_of_their_own() -> None:
    config, source = ABLATIONS["base"], random_source(ABLATIONS["base"], 5, np.float64)
    rng, positions = np.random.default_rng(0), np.array([3, 1_000_000])
    states = [rng.standard_normal((2, 4, 8, 12)) for _ in range(2)]
    ids = np.array([7, 11])
    both = reference_logits(config, source, ids, states, positions)
    for row in range(2):
        part = slice(row, row + 1)
        alone = reference_logits(config, source, ids[part], [s[part] for s in states], positions[part])
        np.testing.assert_allclose(both[part], alone, rtol=0, atol=FLOAT64)
    assert np.abs(both - reference_logits(config, source, ids, states, positions[::-1].copy())).max() > 1e-3


def test_the_decoder_feeds_tokens_one_by_one() -> None:
    config, source = ABLATIONS["base"], random_source(ABLATIONS["base"], 5)
    ids = random_tokens(config, 3, 12, 6)
    decoder = RecurrentDecoder(config, source, "float32", 1)
    decoder.place([np.zeros((3, 4, 8, 12), np.float32) for _ in range(2)], 0)
    logits = [decoder.feed(ids[:, n : n + 1]) for n in range(12)]
    expected = reference.reference_logits(config, source, ids)
    np.testing.assert_allclose(np.stack(logits, 1), expected, rtol=0, atol=GRAPH_FLOAT32)


def test_a_stack_has_no_logits() -> None:
    config = ABLATIONS["stack"]
    with pytest.raises(UsageError, match="without embedding"):
        reference_logits(config, random_source(config, 1), np.array([1]), [], np.array([0]))
