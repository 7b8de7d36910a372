"""Logits of a checkpoint block by block, against the numpy model and the parallel form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from retnet_tools.errors import InputError, UsageError
from retnet_tools.model.retnet import load_model
from retnet_tools.model.streaming import CheckpointLogits
from tests.exports import checkpoint
from tests.helpers import ABLATIONS, FLA, OTHER_LAYERS, random_source, random_tokens
from tests.reference import reference_logits
from tests.tolerances import LOGITS_FLOAT32, LOGITS_FLOAT64

NAMES = ["base", "tied", "key_decay", "shared_key_value_heads", "post_norm", "no_decay", *OTHER_LAYERS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_join_to_the_logits_of_the_numpy_model(name: str, block: int) -> None:
    config = ABLATIONS[name]
    source, ids = random_source(config, 1), random_tokens(config, 2, 20, 1)
    blocks = list(CheckpointLogits(checkpoint(config, source), "float64").stream(ids, block))
    assert [b.shape[1] for b in blocks] == [min(block, 20 - start) for start in range(0, 20, block)]
    np.testing.assert_allclose(
        np.concatenate(blocks, 1), reference_logits(config, source, ids), rtol=0, atol=LOGITS_FLOAT64
    )


def test_the_stream_is_the_parallel_form_where_scores_are_not_clamped() -> None:
    source, ids = random_source(FLA, 2), random_tokens(FLA, 2, 150, 2)
    with torch.no_grad():
        expected = load_model(FLA, source, torch.float32)(torch.from_numpy(ids)).logits.numpy()
    found = np.concatenate(list(CheckpointLogits(checkpoint(FLA, source)).stream(ids, 32)), 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=LOGITS_FLOAT32)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_give_float32(dtype: str) -> None:
    config = ABLATIONS["base"]
    logits = CheckpointLogits(checkpoint(config, random_source(config, 1)), dtype)
    assert next(logits.stream(random_tokens(config, 1, 4, 1), 4)).dtype == np.float32


def test_a_stream_starts_over_each_time() -> None:
    config = ABLATIONS["base"]
    logits, ids = CheckpointLogits(checkpoint(config, random_source(config, 1))), random_tokens(config, 1, 9, 1)
    first, again = (np.concatenate(list(logits.stream(ids, 4)), 1) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_a_stack_and_weights_that_are_not_finite_are_refused() -> None:
    config = ABLATIONS["stack"]
    with pytest.raises(UsageError, match="stack without embedding and head"):
        CheckpointLogits(checkpoint(config, random_source(config, 1)))
    source = random_source(FLA, 1)
    source.tensors["embedding.weight"][0, 0] = np.inf
    with pytest.raises(InputError, match=r"embedding\.weight"):
        CheckpointLogits(checkpoint(FLA, source))


def test_it_knows_the_tokenizer_of_its_checkpoint() -> None:
    opened = checkpoint(FLA, random_source(FLA, 1))
    assert CheckpointLogits(opened).tokenizer_files == ()
    opened.tokenizer_files.extend([Path("a/tokenizer_config.json"), Path("a/tokenizer.json")])
    assert CheckpointLogits(opened).tokenizer_files == tuple(opened.tokenizer_files)


@pytest.mark.parametrize(("asked", "used"), [(None, 1), (3, 3)])
def test_a_stream_takes_the_threads_that_were_asked_for_and_one_for_little_work(asked: int | None, used: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        logits = CheckpointLogits(checkpoint(FLA, random_source(FLA, 2)), threads=asked)
        next(logits.stream(random_tokens(FLA, 2, 5, 2), 5))
        assert torch.get_num_threads() == used
    finally:
        torch.set_num_threads(before)
