"""Prompts by chunks and steps in every mixture: the model's full parallel form, whatever the split."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from retnet_tools.errors import InputError, UsageError
from retnet_tools.graph import contract
from retnet_tools.graph.ops import OPERATOR_SETS
from retnet_tools.model.retention import retention_parallel, retention_recurrent
from retnet_tools.model.retnet import load_model
from retnet_tools.runtime import opening
from retnet_tools.runtime.buffers import HostBuffer
from retnet_tools.runtime.decode import generate
from retnet_tools.runtime.recurrent_state import RecurrentState
from retnet_tools.runtime.session import DecoderSession
from retnet_tools.weights import Array
from tests.exports import export
from tests.helpers import ABLATIONS, BASE, OTHER_LAYERS, random_source, random_tokens
from tests.tolerances import GRAPH_FLOAT32

# The graphs know no clamp of scores; without it the parallel form is the same function.
CONFIG = replace(BASE, score_normalization=replace(BASE.score_normalization, clamp="none"))
SOURCE = random_source(CONFIG, seed=41)
MODEL = load_model(CONFIG, SOURCE, torch.float32)
CHUNK_SIZES = [1, 2, 7, 16, 128]


@pytest.fixture(
    scope="module", params=[(ops, in_place) for ops in OPERATOR_SETS for in_place in (True, False)], ids=str
)
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DecoderSession:
    ops, in_place = request.param
    folder = export(CONFIG, SOURCE, tmp_path_factory.mktemp("prefill") / "out", ops=ops)
    return DecoderSession(folder, threads=1, in_place=in_place)


@torch.no_grad()
def parallel(ids: Array) -> Array:
    """Logits `[T, vocab]` of one row."""
    return MODEL(torch.from_numpy(ids[None]), form=retention_parallel).logits[0].numpy()


@torch.no_grad()
def greedy(ids: Array, count: int) -> list[int]:
    output, tokens = MODEL(torch.from_numpy(ids[None]), form=retention_parallel), []
    for n in range(count):
        tokens.append(int(output.logits[0, -1].argmax()))
        output = MODEL(
            torch.tensor([tokens[-1:]]), form=retention_recurrent, states=output.states, position=len(ids) + n
        )
    return tokens


def close(found: Array | None, expected: Array) -> None:
    assert found is not None
    np.testing.assert_allclose(found, expected, rtol=0, atol=GRAPH_FLOAT32)


def same_states(a: RecurrentState, b: RecurrentState) -> None:
    assert a.position.tolist() == b.position.tolist()
    for x, y in zip(a.numpy(), b.numpy(), strict=True):
        close(x, y)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES[:-1])
def test_every_split_into_prefill_and_steps_equals_the_full_parallel_form(
    session: DecoderSession, chunk_size: int
) -> None:
    length = 3 * chunk_size + 1
    (ids,) = random_tokens(CONFIG, 1, length, seed=42)
    expected = parallel(ids)
    for split in range(1, length + 1):
        state = session.new_state()
        close(session.prefill([ids[:split]], state, chunk_size=chunk_size)[0], expected[split - 1])
        for n in range(split, length):
            logits = session.step(ids[n : n + 1], state)
        if split < length:
            close(logits[0], expected[-1])
        assert state.position.tolist() == [length]


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_one_ragged_batch_of_every_split_equals_the_full_parallel_form(
    session: DecoderSession, chunk_size: int
) -> None:
    length = 3 * chunk_size + 1
    (ids,) = random_tokens(CONFIG, 1, length, seed=43)
    expected, splits = parallel(ids), np.arange(1, length + 1)
    state = session.new_state(length)
    close(session.prefill([ids[:n] for n in splits], state, chunk_size=chunk_size), expected)
    assert state.position.tolist() == splits.tolist()
    for _ in range(length):
        position = state.position
        running = position < length
        logits = session.step(ids[np.minimum(position, length - 1)], state)
        close(logits[running], expected[position[running]])


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_greedy_tokens_are_those_of_torch_at_every_awkward_length(session: DecoderSession, chunk_size: int) -> None:
    (ids,) = random_tokens(CONFIG, 1, 3 * chunk_size + 1, seed=44)
    lengths = {1, chunk_size - 1, chunk_size, chunk_size + 1, 2 * chunk_size, 3 * chunk_size, 3 * chunk_size + 1}
    for length in lengths - {0}:
        result = generate(session, [ids[:length].tolist()], max_tokens=12, chunk_size=chunk_size)
        assert list(result.rows[0].tokens) == greedy(ids[:length], 12)


def test_prefill_goes_on_from_steps_and_from_prefill_row_by_row(session: DecoderSession) -> None:
    ids = random_tokens(CONFIG, 2, 60, seed=45)
    expected = [parallel(row) for row in ids]
    state = session.new_state(2)
    session.prefill([ids[0, :9], ids[1, :2]], state, chunk_size=4)
    for _ in range(3):
        session.step(ids[[0, 1], state.position], state)
    assert state.position.tolist() == [12, 5]
    logits = session.prefill([ids[0, 12:60], ids[1, 5:40]], state, chunk_size=16)
    close(logits, np.stack([expected[0][59], expected[1][39]]))
    assert state.position.tolist() == [60, 40]


def test_a_row_that_ends_early_waits_unchanged(session: DecoderSession) -> None:
    ids = random_tokens(CONFIG, 3, 50, seed=46)
    prompts = [ids[0, :3], ids[1], ids[2, :32]]
    together = session.new_state(3)
    logits = session.prefill(prompts, together, chunk_size=16)
    for row, prompt in enumerate(prompts):
        alone = session.new_state()
        close(logits[row], session.prefill([prompt], alone, chunk_size=16)[0])
        assert together.position[row] == alone.position[0] == len(prompt)
        for a, b in zip(together.numpy(), alone.numpy(), strict=True):
            close(a[row], b[0])


def test_an_array_with_lengths_is_the_same_as_lists(session: DecoderSession) -> None:
    ids, lengths = random_tokens(CONFIG, 3, 20, seed=47), [20, 1, 13]
    a, b = session.new_state(3), session.new_state(3)
    of_lists = session.prefill([row[:n].tolist() for row, n in zip(ids, lengths, strict=True)], a, chunk_size=8)
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = -100
    np.testing.assert_array_equal(session.prefill(ids, b, lengths=lengths, chunk_size=8), of_lists)
    for x, y in zip(a.numpy(), b.numpy(), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_codeword_in_one_row_shows_in_no_other(session: DecoderSession) -> None:
    ids = random_tokens(CONFIG, 3, 40, seed=48)
    planted = ids.copy()
    planted[1, 10:14] = (ids[1, 10:14] + 5) % CONFIG.vocab_size
    results = []
    for batch in (ids, planted):
        state = session.new_state(3)
        logits = [session.prefill(batch, state, lengths=[35, 40, 12], chunk_size=16)]
        logits += [session.step(np.array([1, 2, 3]), state) for _ in range(4)]
        results.append([*logits, *state.numpy()])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a[[0, 2]], b[[0, 2]])
        assert (a[1] != b[1]).any()


@pytest.mark.parametrize("name", ["key_decay", "jamie_stirling", "stack", *OTHER_LAYERS])
@pytest.mark.parametrize("ops", OPERATOR_SETS)
def test_other_models_take_ragged_prompts_too(name: str, ops: str, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    source = random_source(config, seed=49)
    session = DecoderSession(export(config, source, tmp_path / "out", ops=ops), threads=1)
    inputs, lengths = random_tokens(config, 2, 30, seed=50), [30, 11]
    state = session.new_state(2)
    found = session.prefill([row[:n] for row, n in zip(inputs, lengths, strict=True)], state, chunk_size=8)
    with torch.no_grad():
        expected = load_model(config, source, torch.float32)(torch.from_numpy(inputs), form=retention_recurrent).logits
    close(found, expected[[0, 1], [29, 10]].numpy())


def test_one_graph_is_opened_for_steps_and_prompts(session: DecoderSession, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, real = [], opening.open_session
    monkeypatch.setattr(opening, "open_session", lambda path, *a, **k: opened.append(path.name) or real(path, *a, **k))
    fresh = DecoderSession(session.folder, threads=1)
    state = fresh.new_state()
    fresh.prefill([[1]], state)
    fresh.prefill([[1, 2, 3]], state, chunk_size=1)
    fresh.prefill([[1, 2, 3]], state)
    assert opened == [contract.DECODER_FILE]


@pytest.mark.parametrize(
    ("prompts", "chunk_size", "message"),
    [
        ([[1, 2], []], 8, "an empty prompt in row 1"),
        ([[1, 2]], 8, "1 prompts; expected 2, one for each row of the state"),
        ([[1, 2], [3, 61]], 8, "token id 61; expected 0 to 60"),
        ([[1, 2], [3, -1]], 8, "token id -1"),
        ([[1, 2], [3]], 0, "--chunk-size 0"),
    ],
)
def test_wrong_input_is_refused_before_anything_runs(
    session: DecoderSession, prompts: list[list[int]], chunk_size: int, message: str
) -> None:
    state, untouched = session.new_state(2), session.new_state(2)
    with pytest.raises(UsageError, match=message):
        session.prefill(prompts, state, chunk_size=chunk_size)
    same_states(state, untouched)


def test_the_last_position_may_be_filled_and_not_passed(session: DecoderSession) -> None:
    state = session.new_state(2)
    state.position[:] = [contract.MAX_POSITION - 3, 0]
    with pytest.raises(UsageError, match="position 16777216; expected at most 16777215"):
        session.prefill([[1] * 5, [1]], state)
    session.prefill([[1] * 4, [1] * 9], state)
    assert state.position.tolist() == [contract.MAX_POSITION + 1, 9]


def test_an_export_without_its_prefill_graph_is_refused(session: DecoderSession, tmp_path: Path) -> None:
    for name in (contract.MANIFEST_FILE, contract.STEP_FILE, contract.WEIGHTS_FILE):
        (tmp_path / name).write_bytes((session.folder / name).read_bytes())
    with pytest.raises(InputError, match=r"prefill\.onnx is missing"):
        DecoderSession(tmp_path)


@pytest.mark.parametrize("chunk_size", [4, 5])
def test_a_second_set_of_states_goes_with_its_prompt(session: DecoderSession, chunk_size: int) -> None:
    def buffers() -> int:
        gc.collect()
        shape = (2, *contract.state_shape(CONFIG))
        return sum(type(found) is HostBuffer and found.shape == shape for found in gc.get_objects())

    before, state = buffers(), session.new_state(2)
    session.prefill(random_tokens(CONFIG, 2, 9, seed=1), state, chunk_size=chunk_size)
    assert buffers() - before == CONFIG.num_layers * (1 if session.in_place else 2)
