"""The decoder session and generation, against torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from retnet_tools.errors import InputError, ProviderError, UsageError
from retnet_tools.graph import contract
from retnet_tools.model.retention import retention_recurrent
from retnet_tools.model.retnet import load_model
from retnet_tools.runtime.decode import generate
from retnet_tools.runtime.sampling import Sampling
from retnet_tools.runtime.session import DecoderSession
from retnet_tools.runtime.text import open_codec
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
    seen: list[int] = []
    result = generate(session, PROMPT, max_tokens=24, sampling=Sampling(), on_token=seen.append)
    assert list(result.tokens) == seen == torch_greedy(PROMPT, 24)
    assert (result.stop_reason, result.prompt_tokens) == ("length", 5)
    assert result.tokens_per_second > 0
    assert result.prompt_tokens_per_second > 0


def test_an_end_token_ends_the_text_and_is_left_out(session: DecoderSession) -> None:
    tokens = torch_greedy(PROMPT, 24)
    end = tokens[10]
    result = generate(session, PROMPT, max_tokens=24, sampling=Sampling(), end_ids={end})
    assert list(result.tokens) == tokens[: tokens.index(end)]
    assert result.stop_reason == "end-of-text"


def test_sampling_is_reproducible(session: DecoderSession) -> None:
    def draw(seed: int) -> tuple[int, ...]:
        return generate(session, PROMPT, max_tokens=16, sampling=Sampling(1.0, seed=seed)).tokens

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 4, "an empty prompt"),
        ([61], 4, "token id 61; expected 0 to 60"),
        ([-1], 4, "token id -1"),
        ([1], 0, "-tok"),
    ],
)
def test_wrong_input_is_refused(session: DecoderSession, prompt: list[int], count: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        generate(session, prompt, max_tokens=count, sampling=Sampling())


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
        generate(session, [1], max_tokens=1, sampling=Sampling())
    with pytest.raises(UsageError, match="stack without embedding and head; expected a model with a vocabulary"):
        open_codec(out, config.vocab_size, token_ids=True)


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        DecoderSession(tmp_path / "missing")
    with pytest.raises(InputError, match=r"no retnet\.json.*export the checkpoint first"):
        DecoderSession(tmp_path)
    (tmp_path / contract.MANIFEST_FILE).write_bytes((folder / contract.MANIFEST_FILE).read_bytes())
    with pytest.raises(InputError, match=r"no step\.onnx"):
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
    with pytest.raises(InputError, match=r"step\.onnx does not fit retnet\.json"):
        DecoderSession(out)
