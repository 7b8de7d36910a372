"""A model one block at a time is the model: its states after each block, its logits, and what each matrix reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retnet_tools.model.layerwise import EMBEDDING, Block, Head, block_count, embed, head_matrix
from retnet_tools.model.retention import retention_chunkwise
from retnet_tools.model.retnet import load_model
from retnet_tools.weights import canonical_shapes
from tests.helpers import ABLATIONS, BASE, random_source, random_tokens
from tests.reference import reference_logits
from tests.tolerances import FLOAT32

WITH_VOCABULARY = [name for name, config in ABLATIONS.items() if config.has_vocabulary]
LENGTH = 150  # more than a chunk


def walk(name: str) -> tuple[np.ndarray, list[np.ndarray], dict[str, np.ndarray]]:
    """Logits, the states after each block, and what each matrix reads, one block at a time."""
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], 3)
    x = embed(config, source, source.read(EMBEDDING), random_tokens(config, 2, LENGTH, 4))
    states, inputs = [x], {}
    for n in range(block_count(config)):
        block = Block(config, source, n)
        for step, names in enumerate(block.matrices):
            inputs |= dict.fromkeys(names, block.inputs(step, x))
        x = block(x)
        states.append(x)
    head = Head(config, source, source.read(head_matrix(config)))
    inputs[head_matrix(config)] = head.inputs(x)
    return head.logits(x), states, inputs


@pytest.mark.parametrize("name", WITH_VOCABULARY)
def test_blocks_one_after_another_are_the_model(name: str) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], 3)
    ids = torch.from_numpy(random_tokens(config, 2, LENGTH, 4))
    model = load_model(config, source, torch.float32)
    read: dict[str, np.ndarray] = {}

    def keep(linear: str):
        def hook(module, arguments):
            read[f"{linear}.weight"] = arguments[0].flatten(0, 1).numpy()

        return hook

    for linear, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(keep(linear))
    with torch.no_grad():
        output = model(ids, form=retention_chunkwise, keep_hidden=True)
    logits, states, inputs = walk(name)
    np.testing.assert_allclose(logits.reshape(2, LENGTH, -1), output.logits.numpy(), rtol=0, atol=1e-5)
    for expected, found in zip(output.hidden_states, states[::2], strict=True):
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)
    matrices = {name for name, shape in canonical_shapes(config).items() if len(shape) == 2}
    assert set(inputs) | {EMBEDDING} == matrices
    for matrix, expected in read.items():
        np.testing.assert_allclose(inputs[matrix], expected, rtol=0, atol=1e-5)


def test_logits_are_those_of_the_numpy_reference() -> None:
    ids = random_tokens(BASE, 2, LENGTH, 4)
    expected = reference_logits(BASE, random_source(BASE, 3), ids)
    np.testing.assert_allclose(walk("base")[0].reshape(expected.shape), expected, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_matrix_that_is_set_is_used(index: int) -> None:
    source, x = random_source(BASE, 3), np.random.default_rng(5).standard_normal((1, 9, 32), np.float32)
    for name in (name for step in Block(BASE, source, index).matrices for name in step):
        changed = random_source(BASE, 3)
        changed.tensors[name] = changed.tensors[name][::-1].copy()
        block = Block(BASE, source, index)
        before = block(x)
        block.set_matrix(name, changed.tensors[name])
        np.testing.assert_array_equal(block.matrix(name), changed.tensors[name])
        np.testing.assert_array_equal(block(x), Block(BASE, changed, index)(x))
        assert np.abs(block(x) - before).max() > 1e-3
