"""`DecoderSession.score`: the logits of every token by chunks, against the float64 parallel form of the checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from retnet_tools.errors import UsageError
from retnet_tools.evaluate.logits import ExportLogits
from retnet_tools.evaluate.perplexity import measure_perplexity
from retnet_tools.evaluate.scored_text import ScoredText
from retnet_tools.evaluate.scoring import Windows
from retnet_tools.graph.contract import DECODER_FILE, MAX_POSITION
from retnet_tools.graph.ops import OPERATOR_SETS
from retnet_tools.model.retention import retention_parallel
from retnet_tools.model.retnet import load_model
from retnet_tools.runtime.recurrent_state import RecurrentState
from retnet_tools.runtime.session import DecoderSession
from retnet_tools.weights import Array
from tests.exports import export
from tests.graph.test_prefill import without_clamp
from tests.helpers import ABLATIONS, BASE, OTHER_LAYERS, random_source, random_tokens
from tests.quantized import decoded_source, quantize
from tests.reference import reference_logits
from tests.tolerances import GRAPH_FLOAT32

CONFIG = without_clamp(BASE)
SOURCE = random_source(CONFIG, seed=91)
MODEL = load_model(CONFIG, SOURCE, torch.float64)
CHUNK_SIZES = [1, 2, 7, 16, 64]
STEPS_NLL = 1e-5
"""Nats a token between scoring by chunks and token by token, both float32: what rounding may do."""


@pytest.fixture(
    scope="module", params=[(ops, in_place) for ops in OPERATOR_SETS for in_place in (True, False)], ids=str
)
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DecoderSession:
    ops, in_place = request.param
    folder = export(CONFIG, SOURCE, tmp_path_factory.mktemp("score") / "out", ops=ops)
    return DecoderSession(folder, threads=1, in_place=in_place)


@torch.no_grad()
def parallel(ids: Array) -> Array:
    """Logits `[B, T, vocab]` float64 of whole rows."""
    return MODEL(torch.from_numpy(ids), form=retention_parallel).logits.numpy()


def close(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=GRAPH_FLOAT32)


def same_states(a: RecurrentState, b: RecurrentState) -> None:
    assert a.position.tolist() == b.position.tolist()
    for x, y in zip(a.numpy(), b.numpy(), strict=True):
        close(x, y)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("length", [1, 31, 33])
def test_every_token_of_every_row_has_its_logits(session: DecoderSession, chunk_size: int, length: int) -> None:
    ids = random_tokens(CONFIG, 3, length, seed=92)
    state, prompted = session.new_state(3), session.new_state(3)
    blocks = list(session.score(ids, state, chunk_size=chunk_size))
    full, rest = divmod(length, chunk_size)
    assert [block.shape[1] for block in blocks] == [chunk_size] * full + [rest] * bool(rest)
    assert {block.dtype for block in blocks} == {np.dtype(np.float32)}
    close(np.concatenate(blocks, axis=1), parallel(ids))
    session.prefill(ids, prompted, chunk_size=chunk_size)
    same_states(state, prompted)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_states_are_carried_from_call_to_call_and_to_steps(session: DecoderSession, chunk_size: int) -> None:
    ids = random_tokens(CONFIG, 2, 40, seed=93)
    expected, state = parallel(ids), session.new_state(2)
    session.prefill(ids[:, :5], state, chunk_size=4)
    blocks = list(session.score(ids[:, 5:18], state, chunk_size=chunk_size))
    stepped = session.step(ids[:, 18], state)
    blocks += [stepped[:, None], *session.score(ids[:, 19:39], state, chunk_size=chunk_size)]
    close(np.concatenate(blocks, axis=1), expected[:, 5:39])
    close(session.step(ids[:, 39], state), expected[:, 39])


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_rows_that_have_ended_wait_for_the_others(session: DecoderSession, chunk_size: int) -> None:
    """With chunks of one column too, of which some rows have none left."""
    lengths = [3, 18, 1, 17]
    ids = random_tokens(CONFIG, 4, 18, seed=94)
    expected, together, prompted = parallel(ids), session.new_state(4), session.new_state(4)
    given = ids.copy()
    for row, length in enumerate(lengths):
        given[row, length:] = -100
    found = np.concatenate(list(session.score(given, together, lengths=lengths, chunk_size=chunk_size)), axis=1)
    assert found.shape[1] == max(lengths)
    session.prefill(given, prompted, lengths=lengths, chunk_size=chunk_size)
    for row, length in enumerate(lengths):
        close(found[row, :length], expected[row, :length])
    assert together.position.tolist() == lengths
    same_states(together, prompted)
    logits = session.step(ids[np.arange(4), np.minimum(lengths, 17)], together)
    for row in (0, 2, 3):
        close(logits[row], expected[row, lengths[row]])


def test_lists_of_any_lengths_are_an_array_with_lengths(session: DecoderSession) -> None:
    ids, lengths = random_tokens(CONFIG, 3, 12, seed=95), [12, 2, 7]
    blocks = []
    for rows, counts in ((ids, lengths), ([row[:n].tolist() for row, n in zip(ids, lengths, strict=True)], None)):
        blocks.append(list(session.score(rows, session.new_state(3), lengths=counts, chunk_size=5)))
    for a, b in zip(*blocks, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["key_decay", "jamie_stirling", "stack", "shared_key_value_heads", *OTHER_LAYERS])
@pytest.mark.parametrize("ops", OPERATOR_SETS)
def test_other_models_are_scored_too(name: str, ops: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=96)
    session = DecoderSession(export(config, source, tmp_path / "out", ops=ops), threads=1)
    inputs = random_tokens(config, 2, 15, seed=97)
    expected = reference_logits(config, source, inputs)
    for chunk_size in (1, 4, 15):
        blocks = session.score(inputs, session.new_state(2), lengths=[15, 9], chunk_size=chunk_size)
        found = np.concatenate(list(blocks), axis=1)
        close(found[0], expected[0])
        close(found[1, :9], expected[1, :9])


def test_one_that_is_closed_early_leaves_the_state_after_the_last_chunk_taken(session: DecoderSession) -> None:
    ids = random_tokens(CONFIG, 2, 30, seed=98)
    expected, state = parallel(ids), session.new_state(2)
    blocks = session.score(ids, state, chunk_size=8)
    close(next(blocks), expected[:, :8])
    close(next(blocks), expected[:, 8:16])
    blocks.close()
    assert state.position.tolist() == [16, 16]
    close(session.step(ids[:, 16], state), expected[:, 16])
    rest = list(session.score(ids[:, 17:], state, chunk_size=8))
    close(np.concatenate(rest, axis=1), expected[:, 17:])


def test_blocks_are_the_callers_own(session: DecoderSession) -> None:
    ids = random_tokens(CONFIG, 1, 12, seed=99)
    blocks = list(session.score(ids, session.new_state(), chunk_size=4))
    for block in blocks:
        block += 1
    again = list(session.score(ids, session.new_state(), chunk_size=4))
    for block, other in zip(blocks, again, strict=True):
        np.testing.assert_array_equal(block, other + 1)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([[1, 2]], {}, "1 prompts; expected 2"),
        ([[1], []], {}, "an empty prompt in row 1"),
        ([[1], [CONFIG.vocab_size]], {}, "token id 61"),
        ([[1], [-1]], {}, "token id -1"),
        ([[1, 2], [3, 4]], {"lengths": [3, 1]}, "lengths"),
        ([[1], [2]], {"chunk_size": 0}, "--chunk-size 0"),
    ],
)
def test_wrong_input_is_refused_before_anything_runs(
    session: DecoderSession, rows: list[list[int]], options: dict, message: str
) -> None:
    state = session.new_state(2)
    with pytest.raises(UsageError, match=message):
        next(session.score(rows, state, **options))
    assert state.position.tolist() == [0, 0]
    assert not any(layer.any() for layer in state.numpy())


def test_the_last_position_may_be_scored_and_not_passed(session: DecoderSession) -> None:
    state = session.new_state()
    state.advance(np.array([MAX_POSITION - 2]), swap=False)
    with pytest.raises(UsageError, match=f"position {MAX_POSITION + 1}"):
        next(session.score([[1, 2, 3, 4]], state))
    blocks = list(session.score([[1, 2, 3]], state, chunk_size=2))
    assert all(np.isfinite(block).all() for block in blocks)
    assert state.position.tolist() == [MAX_POSITION + 1]


def test_a_closed_session_scores_nothing(tmp_path: Path) -> None:
    session = DecoderSession(export(CONFIG, SOURCE, tmp_path / "out"), threads=1)
    state = session.new_state()
    session.close()
    with pytest.raises(UsageError, match="is closed"):
        next(session.score([[1]], state))


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_perplexity_is_that_of_the_same_text_token_by_token(weights: str, tmp_path: Path) -> None:
    """-ln p by steps in plain Python, and of float64 on the weights as they are decoded."""
    folder = export(CONFIG, SOURCE, tmp_path / "out")
    if weights != "float32":
        folder = quantize(folder, tmp_path / weights, weights, block_size=32, accuracy_level=0)
    ids = random_tokens(CONFIG, 1, 150, seed=100)[0]
    report = measure_perplexity(ExportLogits(folder, threads=1), ScoredText(ids, None), Windows(50, 50))
    session, by_steps, wide = DecoderSession(folder, threads=1), [], []
    source = SOURCE if weights == "float32" else decoded_source(CONFIG, folder / DECODER_FILE)
    for start in range(0, 149, 50):
        row, state = ids[start : start + 51], session.new_state()
        expected = reference_logits(CONFIG, source, row[None, :-1])[0]
        for token, following, exact in zip(row[:-1], row[1:], expected, strict=True):
            for logits, found in ((session.step(np.array([token]), state)[0], by_steps), (exact, wide)):
                scores = [math.exp(x) for x in logits.tolist()]
                found.append(math.log(math.fsum(scores)) - float(logits[following]))
    assert report.scored_tokens == len(by_steps) == 149
    assert report.model.nll.value == pytest.approx(math.fsum(by_steps) / 149, abs=STEPS_NLL)
    assert report.model.nll.value == pytest.approx(math.fsum(wide) / 149, abs=STEPS_NLL)


def test_a_chunk_of_one_column_that_is_padded_is_no_chunk_of_two(tmp_path: Path) -> None:
    """Its logits are of one place, though it is as wide as the chunks before it."""
    out = export(BASE, random_source(BASE, 1), tmp_path / "out")
    ids = random_tokens(BASE, 2, 7, 3)
    with DecoderSession(out, threads=1) as session:
        blocks = list(session.score(ids, session.new_state(2), lengths=[7, 4], chunk_size=2))
        whole = next(session.score(ids, session.new_state(2), lengths=[7, 4], chunk_size=7))
    assert [block.shape[1] for block in blocks] == [2, 2, 2, 1]
    np.testing.assert_allclose(np.concatenate(blocks, 1)[0], whole[0], rtol=0, atol=GRAPH_FLOAT32)


def test_a_state_that_was_fed_in_between_and_a_closed_session_are_refused(tmp_path: Path) -> None:
    out = export(BASE, random_source(BASE, 1), tmp_path / "out")
    ids = random_tokens(BASE, 1, 8, 3)
    session = DecoderSession(out, threads=1)
    state = session.new_state()
    blocks = session.score(ids, state, chunk_size=2)
    next(blocks)
    session.step(ids[:, 0], state)
    with pytest.raises(UsageError, match="fed something else between two blocks"):
        next(blocks)
    blocks = session.score(ids, session.new_state(), chunk_size=2)
    next(blocks)
    session.close()
    with pytest.raises(UsageError, match="is closed"):
        next(blocks)
