"""The decoder session and generation, against torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from retnet_tools.errors import InputError, ProviderError, UsageError
from retnet_tools.graph import contract
from retnet_tools.model.retention import retention_recurrent
from retnet_tools.model.retnet import load_model
from retnet_tools.runtime.codec import IdCodec, open_codec
from retnet_tools.runtime.decode import Generation, Generations, Stopping, generate, generate_from
from retnet_tools.runtime.sampling import Sampling
from retnet_tools.runtime.sequences import NO_TOKENS, Sequences, hash_tokens
from retnet_tools.runtime.session import DecoderSession
from tests.exports import export
from tests.helpers import ABLATIONS, BASE, random_source, random_tokens
from tests.tolerances import GRAPH_FLOAT32

SOURCE = random_source(BASE, seed=21)
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(BASE, SOURCE, tmp_path_factory.mktemp("decode") / "out")


@pytest.fixture(scope="module")
def session(folder: Path) -> DecoderSession:
    return DecoderSession(folder, threads=1)


@torch.no_grad()
def torch_greedy(prompt: list[int], count: int) -> list[int]:
    model = load_model(BASE, SOURCE, torch.float32)
    tokens = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([tokens]), form=retention_recurrent).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_steps_equal_torch_and_states_move_on(session: DecoderSession) -> None:
    ids = random_tokens(BASE, 3, 40, seed=22)
    with torch.no_grad():
        expected = load_model(BASE, SOURCE, torch.float32)(torch.from_numpy(ids), form=retention_recurrent)
    state = session.new_state(3)
    for n in range(40):
        logits = session.step(ids[:, n], state)
        np.testing.assert_allclose(logits, expected.logits[:, n].numpy(), rtol=0, atol=GRAPH_FLOAT32)
    assert state.position.tolist() == [40, 40, 40]
    for got, reference in zip(state.numpy(), expected.states, strict=True):
        np.testing.assert_allclose(got, reference.numpy(), rtol=0, atol=GRAPH_FLOAT32)


def test_a_step_without_logits_leaves_the_same_state(session: DecoderSession) -> None:
    with_logits, without = session.new_state(), session.new_state()
    for token in PROMPT:
        session.step(np.array([token]), with_logits)
        assert session.step(np.array([token]), without, logits=False) is None
    for a, b in zip(with_logits.numpy(), without.numpy(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert session.prefill([PROMPT], session.new_state()).shape == (1, BASE.vocab_size)


def test_two_sequences_in_turn_do_not_mix(session: DecoderSession) -> None:
    alone = session.prefill([PROMPT], session.new_state())
    a, b = session.new_state(), session.new_state()
    for token in PROMPT:
        interleaved = session.step(np.array([token]), a)
        session.step(np.array([token + 7]), b)
    np.testing.assert_allclose(alone, interleaved, rtol=0, atol=GRAPH_FLOAT32)


def test_greedy_tokens_equal_torch(session: DecoderSession) -> None:
    seen: list[tuple[int, int | None, str]] = []
    result = generate(session, [PROMPT], max_tokens=24, on_token=lambda *call: seen.append(call))
    assert list(result.rows[0].tokens) == [token for _, token, _ in seen] == torch_greedy(PROMPT, 24)
    assert (result.rows[0].stop_reason, result.prompt_tokens) == ("length", 5)
    assert result.tokens_per_second > 0
    assert result.prompt_tokens_per_second > 0


def test_a_batch_of_ragged_prompts_equals_torch_row_by_row(session: DecoderSession) -> None:
    prompts = [PROMPT, [7], list(range(20)), [9, 9, 9]]
    result = generate(session, prompts, max_tokens=12, chunk_size=4)
    assert [list(row.tokens) for row in result.rows] == [torch_greedy(prompt, 12) for prompt in prompts]
    assert result.prompt_tokens == 29


@pytest.mark.parametrize("keep", [False, True])
def test_rows_that_end_leave_the_others_as_they_are(session: DecoderSession, keep: bool) -> None:
    prompts = [[n, 2 * n, 3 * n] for n in range(1, 8)]
    alone = [torch_greedy(prompt, 30) for prompt in prompts]
    ends = frozenset({tokens[n] for n, tokens in zip((3, 20, 8), alone, strict=False)})
    sequences = Sequences.start(session, len(prompts))
    result = generate_from(sequences, prompts, Stopping(30, ends), keep=keep)
    lengths = set()
    for row, tokens in zip(result.rows, alone, strict=True):
        end = next((n for n, token in enumerate(tokens) if token in ends), None)
        assert list(row.tokens) == tokens[:end]
        assert row.stop_reason == ("length" if end is None else "end-of-text")
        lengths.add(len(row.tokens))
    assert len(lengths) > 2
    assert (result.sequences is not None) == keep


def test_rows_that_have_ended_are_left_out_once_they_are_half_of_the_batch(
    session: DecoderSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[n, 2 * n, 3 * n] for n in range(1, 9)]
    alone = [torch_greedy(prompt, 20) for prompt in prompts]
    ends, sizes, step = {alone[0][2], alone[1][5], alone[2][9]}, list[int](), session.step
    monkeypatch.setattr(session, "step", lambda tokens, state: sizes.append(len(tokens)) or step(tokens, state))
    generate(session, prompts, max_tokens=20, end_ids=ends)
    lasts = [next((n for n, token in enumerate(tokens) if token in ends), 19) for tokens in alone]
    expected, size = [], 8
    for n in range(20):
        live = sum(last > n for last in lasts)
        size = live if 2 * live <= size else size
        expected += [size] if size else []
    assert sizes == expected
    assert len(set(sizes)) > 1


def test_an_end_token_ends_the_text_and_is_left_out(session: DecoderSession) -> None:
    tokens = torch_greedy(PROMPT, 24)
    end = tokens[10]
    (row,) = generate(session, [PROMPT], max_tokens=24, end_ids={end}).rows
    assert list(row.tokens) == tokens[: tokens.index(end)]
    assert row.stop_reason == "end-of-text"


def test_kept_sequences_hold_every_token_but_the_one_that_ended_the_text(session: DecoderSession) -> None:
    tokens = torch_greedy(PROMPT, 24)
    end = tokens[10]
    cut = tokens[: tokens.index(end)]
    prompts = [PROMPT, PROMPT[:2]]
    result = generate_from(Sequences.start(session, 2), prompts, Stopping(24, {end}), keep=True)
    assert result.sequences is not None
    for i, row in enumerate(result.rows):
        whole = [*prompts[i], *row.tokens]
        expected = session.new_state()
        logits = session.prefill([whole], expected)
        assert result.sequences.state.position[i] == len(whole)
        assert result.sequences.token_hashes[i] == hash_tokens(NO_TOKENS, whole)
        np.testing.assert_allclose(result.sequences.logits[i], logits[0], rtol=0, atol=GRAPH_FLOAT32)
        for kept, fresh in zip(result.sequences.state.numpy(), expected.numpy(), strict=True):
            np.testing.assert_allclose(kept[i], fresh[0], rtol=0, atol=GRAPH_FLOAT32)
    assert list(result.rows[0].tokens) == cut


def test_tokens_are_hashed_as_the_documentation_says() -> None:
    """h_n = sha256(h_(n-1) + token n as 8 bytes, little-endian), so that states of other programs can be told apart."""
    first = hashlib.sha256(hashlib.sha256(b"retnet-tools tokens").digest() + b"\x02\x01\0\0\0\0\0\0").digest()
    assert hash_tokens(NO_TOKENS, [258]) == first
    assert hash_tokens(NO_TOKENS, [258, 7]) == hashlib.sha256(first + b"\x07" + bytes(7)).digest()


def test_the_rate_of_generating_counts_the_steps_that_were_run() -> None:
    """The first token of a row comes with its prompt; a token that ends a text took a step and is not shown."""
    rows = (
        Generation((1, 2, 3), "", "length"),
        Generation((), "", "end-of-text"),
        Generation((1, 2), "", "end-of-text"),
    )
    result = Generations(rows, prompt_tokens=12, prompt_seconds=3.0, decode_seconds=2.0)
    assert (result.tokens_per_second, result.prompt_tokens_per_second) == (2.0, 4.0)


def test_samples_of_one_prompt_are_forked_from_one_reading(session: DecoderSession, monkeypatch) -> None:
    fed, real = [], DecoderSession.prefill
    monkeypatch.setattr(
        DecoderSession, "prefill", lambda self, ids, *a, **k: fed.append(len(ids)) or real(self, ids, *a, **k)
    )
    sampling = Sampling(1.0, seed=5)
    several = generate(session, [PROMPT, [1, 2]], max_tokens=12, sampling=sampling, samples=3)
    assert fed == [2]
    tokens = [row.tokens for row in several.rows]
    assert len(set(tokens)) == 6
    # The first sample of the first prompt draws what a single one would have drawn.
    assert tokens[0] == generate(session, [PROMPT], max_tokens=12, sampling=sampling).rows[0].tokens
    greedy = generate(session, [PROMPT], max_tokens=12, samples=3)
    assert [list(row.tokens) for row in greedy.rows] == [torch_greedy(PROMPT, 12)] * 3


def test_sampling_is_reproducible_and_a_row_does_not_depend_on_its_neighbours(session: DecoderSession) -> None:
    def draw(seed: int, prompts: list[list[int]]) -> tuple[int, ...]:
        return generate(session, prompts, max_tokens=16, sampling=Sampling(1.0, seed=seed)).rows[0].tokens

    assert draw(1, [PROMPT]) == draw(1, [PROMPT]) == draw(1, [PROMPT, [4], [5, 6]])
    assert draw(1, [PROMPT]) != draw(2, [PROMPT])


def test_a_repetition_penalty_counts_the_prompt_too(session: DecoderSession) -> None:
    plain = torch_greedy(PROMPT, 1)[0]
    penalty = Sampling(repetition_penalty=1e6)
    tokens = generate(session, [[*PROMPT]], max_tokens=20, sampling=penalty).rows[0].tokens
    assert len({*tokens, *PROMPT}) == len(tokens) + len(set(PROMPT))
    state = session.new_state()
    logits = session.prefill([PROMPT], state)[0]
    assert plain == logits.argmax()


def test_stop_strings_cut_the_text_across_tokens(session: DecoderSession) -> None:
    codec = IdCodec()
    tokens = torch_greedy(PROMPT, 24)
    text = " ".join(map(str, tokens))
    words = text.split(" ")
    stop = f"{words[9]} {words[10]} "
    place = text.index(stop)
    seen: list[str] = []
    result = generate(
        session,
        [PROMPT],
        max_tokens=24,
        codec=codec,
        stop=[stop],
        on_token=lambda row, token, piece: seen.append(piece),
    )
    assert result.rows[0].text == "".join(seen) == text[:place]
    assert result.rows[0].stop_reason == "stop-string"
    with pytest.raises(UsageError, match="stop strings without a codec"):
        generate(session, [PROMPT], stop=[stop])


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 4, "an empty prompt"),
        ([61], 4, "token id 61; expected 0 to 60"),
        ([-1], 4, "token id -1"),
        ([1.5], 4, "a prompt of float64; expected numbers that fit int64"),
        ([10**30], 4, "a prompt of object"),
        ("12", 4, "a prompt of <U2"),
        (1, 4, "a prompt that is one number"),
        ([1], 0, "-tok"),
    ],
)
def test_wrong_input_is_refused(session: DecoderSession, prompt: list[int], count: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        generate(session, [prompt], max_tokens=count)


def test_prompts_are_lists_or_arrays_and_not_none_at_all(session: DecoderSession) -> None:
    prompts = [[3, 1, 4], [1, 5, 9]]
    assert generate(session, np.array(prompts), max_tokens=5).rows == generate(session, prompts, max_tokens=5).rows
    with pytest.raises(UsageError, match="a batch of 0; expected at least one sequence"):
        generate(session, [])


def test_a_text_that_would_pass_the_last_position_is_refused_before_it_begins(session: DecoderSession) -> None:
    sequences = Sequences.start(session)
    sequences.state.position[:] = contract.MAX_POSITION - 10
    for prompt, found in (([1, 2, 3], 16_777_218), ([1, 2], 16_777_217)):
        with pytest.raises(UsageError, match=f"a sequence of {found} tokens; expected at most 16777216"):
            generate_from(sequences, [prompt], Stopping(10))
    # Each row has its own last position.
    ragged = Sequences.start(session, 2)
    ragged.state.position[:] = [contract.MAX_POSITION - 10, 0]
    assert len(generate_from(ragged, [[1], [1] * 40], Stopping(10)).rows) == 2


def test_a_row_that_ends_before_the_last_position_is_stepped_along_with_the_others(session: DecoderSession) -> None:
    prompts, count = [[3, 1], [2, 7], [1, 8]], 12
    sequences = Sequences.start(session, 3)
    start = contract.MAX_POSITION + 1 - len(prompts[0]) - count
    sequences.state.position[:] = [start, 0, 0]
    alone = [torch_greedy(prompt, count) for prompt in prompts[1:]]
    far = Sequences.start(session)
    far.state.position[:] = start
    first = generate_from(far, prompts[:1], Stopping(count)).rows[0].tokens[0]
    assert all(first not in tokens for tokens in alone)
    rows = generate_from(sequences, prompts, Stopping(count, {first})).rows
    assert [row.stop_reason for row in rows] == ["end-of-text", "length", "length"]
    assert [list(row.tokens) for row in rows] == [[], *alone]


def test_what_is_fed_stays_the_callers(session: DecoderSession) -> None:
    ids, prompts = np.array([3, 4]), random_tokens(BASE, 2, 6, seed=27)
    state, before = session.new_state(2), prompts.copy()
    for tokens in (ids, np.array([9, 8]), ids, ids + 1):
        session.step(tokens, state)
    session.prefill(prompts, state, chunk_size=2)
    assert ids.tolist() == [3, 4]
    np.testing.assert_array_equal(prompts, before)


@pytest.mark.parametrize("ops", ["fused", "standard"])
def test_states_written_in_place_are_those_of_a_double_buffer(ops: str, tmp_path: Path) -> None:
    config = ABLATIONS["shared_key_value_heads"]
    out = export(config, random_source(config, seed=25), tmp_path / "out", ops=ops)
    ids, states = random_tokens(config, 3, 60, seed=26), []
    for in_place in (True, False):
        session = DecoderSession(out, threads=1, in_place=in_place)
        state = session.new_state(3)
        logits = [session.prefill(ids[:, :20], state, chunk_size=8)]
        logits += [session.step(ids[:, n], state) for n in range(20, 40)]
        logits += [session.prefill(ids[:, 40:50], state, chunk_size=4), session.step(ids[:, 50], state)]
        states.append([*logits, *state.numpy()])
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_wrong_batch_is_refused(session: DecoderSession) -> None:
    with pytest.raises(UsageError, match=r"shape \[2\]; expected \[1\]"):
        session.step(np.array([1, 2]), session.new_state())


def test_a_position_past_the_tables_is_refused(session: DecoderSession) -> None:
    state = session.new_state()
    state.position[:] = contract.MAX_POSITION
    session.step(np.array([1]), state)
    with pytest.raises(UsageError, match="position 16777216; expected at most 16777215"):
        session.step(np.array([1]), state)


def test_a_stack_steps_on_embeddings_and_generates_no_text(tmp_path: Path) -> None:
    config = ABLATIONS["jamie_stirling"]
    source, embeddings = random_source(config, seed=23), random_tokens(config, 2, 12, seed=24)
    out = export(config, source, tmp_path / "out")
    session = DecoderSession(out, threads=1)
    with torch.no_grad():
        model = load_model(config, source, torch.float32)
        expected = model(torch.from_numpy(embeddings), form=retention_recurrent).logits
    state = session.new_state(2)
    for n in range(12):
        hidden = session.step(embeddings[:, n], state)
        np.testing.assert_allclose(hidden, expected[:, n].numpy(), rtol=0, atol=GRAPH_FLOAT32)
    with pytest.raises(UsageError, match=r"shape \[1\] in row 0; expected \[tokens, 32\]"):
        generate(session, [[1]], max_tokens=1)
    with pytest.raises(UsageError, match="stack without embedding and head; expected a model with a vocabulary"):
        open_codec(out, config.vocab_size, token_ids=True)


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        DecoderSession(tmp_path / "missing")
    with pytest.raises(InputError, match=r"no retnet\.json.*export the checkpoint first"):
        DecoderSession(tmp_path)
    (tmp_path / contract.MANIFEST_FILE).write_bytes((folder / contract.MANIFEST_FILE).read_bytes())
    with pytest.raises(InputError, match=r"\.onnx is missing"):
        DecoderSession(tmp_path)
    (tmp_path / contract.MANIFEST_FILE).write_text("{}")
    with pytest.raises(InputError, match="not a manifest"):
        DecoderSession(tmp_path)


def test_bfloat16_on_the_cpu_says_what_to_do(tmp_path: Path) -> None:
    out = export(BASE, SOURCE, tmp_path / "out", dtype="bfloat16")
    with pytest.raises(ProviderError, match=r"cannot run on cpu.*export with --dtype fp32 or fp16"):
        DecoderSession(out)


def test_a_manifest_of_another_model_is_refused(tmp_path: Path) -> None:
    out = export(BASE, SOURCE, tmp_path / "out")
    document = json.loads((out / contract.MANIFEST_FILE).read_text())
    document["config"]["value_dim"] *= 2
    (out / contract.MANIFEST_FILE).write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"decoder\.onnx does not fit retnet\.json"):
        DecoderSession(out)


def test_an_export_for_genai_is_named(tmp_path: Path) -> None:
    out = export(BASE, SOURCE, tmp_path / "out", target="genai")
    with pytest.raises(InputError, match=r"holds model\.onnx; expected an export of --to onnx"):
        DecoderSession(out)
