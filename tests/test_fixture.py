"""The trained checkpoint that ships: it is the same model in every form and graph, and it has learned its language."""

from __future__ import annotations

import importlib.util
import json
import lzma
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from retnet_tools.formats import Checkpoint, open_checkpoint
from retnet_tools.graph.contract import STEP_FILE
from retnet_tools.graph.export import ExportPlan, plan_export
from retnet_tools.graph.ops import OPERATOR_SETS
from retnet_tools.jobs.request import shipped_checkpoint
from retnet_tools.model.agreement import compare_forms, select_forms
from retnet_tools.model.retention import retention_parallel, retention_recurrent
from retnet_tools.model.retnet import RetNet, load_model
from retnet_tools.runtime.decode import Stopping, generate, generate_from
from retnet_tools.runtime.sequences import Sequences
from retnet_tools.runtime.session import DecoderSession
from retnet_tools.runtime.state_file import capture, read_state, write_state
from retnet_tools.tokenizing.files import load_tokenizer
from tests.exports import cpu_runner, export, run_steps, zero_states
from tests.tolerances import FLOAT16_KL, GRAPH_FLOAT32, LOGITS_FLOAT32, LOGITS_FLOAT64

ROOT = Path(__file__).parent.parent
FIXTURE = ROOT / "fixtures" / "shakespeare"
PROMPT = "HAMLET.\nTo be, or not to be"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(FIXTURE)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> RetNet:
    return load_model(checkpoint.config, checkpoint.weights, torch.float32)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    text = (FIXTURE / "heldout.txt").read_text(encoding="utf-8")
    return np.array([load_tokenizer(FIXTURE / "tokenizer.json").encode(text[20_000:22_000]).ids[:256]])


@pytest.fixture(scope="module")
def train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train", ROOT / "fixtures" / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_has_the_size_that_was_asked_for(checkpoint: Checkpoint, model: RetNet) -> None:
    assert 3e6 <= sum(p.numel() for p in model.parameters()) <= 6e6
    assert checkpoint.config.num_layers >= 4
    assert checkpoint.config.num_heads >= 4
    assert {checkpoint.weights.info(name).dtype.name for name in checkpoint.weights.names()} == {"float16"}
    assert sum(file.stat().st_size for file in checkpoint.source_files) <= 16e6


def test_the_package_ships_the_same_checkpoint() -> None:
    shipped = shipped_checkpoint()
    assert shipped != FIXTURE
    files = {path.name for path in shipped.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE.md"} <= files
    assert all((shipped / name).read_bytes() == (FIXTURE / name).read_bytes() for name in files)


def test_the_forms_agree(checkpoint: Checkpoint, tokens: np.ndarray) -> None:
    forms = select_forms(["parallel", "recurrent", "chunkwise"], 48)
    report = compare_forms(checkpoint.config, checkpoint.weights, tokens, forms)
    assert report.passed
    for comparison in report.comparisons:
        assert comparison.float64_eps0.max_abs <= LOGITS_FLOAT64
        assert comparison.run.max_abs - comparison.float64.max_abs <= LOGITS_FLOAT32
    assert {c.cause for c in report.comparisons if "parallel" in (c.a, c.b)} == {"normalisation-epsilon"}


@pytest.mark.parametrize("ops", OPERATOR_SETS)
def test_the_step_graph_equals_the_torch_recurrent_form(
    ops: str, checkpoint: Checkpoint, model: RetNet, tokens: np.ndarray, tmp_path: Path
) -> None:
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens), form=retention_recurrent).logits.numpy()
    run = cpu_runner(export(checkpoint.config, checkpoint.weights, tmp_path / "out", ops=ops) / STEP_FILE)
    for n, (logits, _) in enumerate(run_steps(run, tokens, zero_states(checkpoint.config, 1))):
        np.testing.assert_allclose(logits, expected[:, n], rtol=0, atol=GRAPH_FLOAT32)


@torch.no_grad()
def torch_greedy(model: RetNet, prompt: list[int], count: int) -> list[int]:
    tokens: list[int] = []
    output = model(torch.tensor([prompt]), form=retention_recurrent)
    while len(tokens) < count:
        tokens.append(int(output.logits[0, -1].argmax()))
        position = len(prompt) + len(tokens) - 1
        output = model(torch.tensor([tokens[-1:]]), form=retention_recurrent, states=output.states, position=position)
    return tokens


def torch_greedy_text(model: RetNet, prompt: str, count: int) -> str:
    tokenizer = load_tokenizer(FIXTURE / "tokenizer.json")
    return tokenizer.decode(torch_greedy(model, tokenizer.encode(prompt).ids, count))


def test_greedy_text_is_the_same_in_torch_fused_and_standard(model: RetNet, tmp_path: Path, cli) -> None:
    texts = {"torch": torch_greedy_text(model, PROMPT, 100)}
    for ops in OPERATOR_SETS:
        assert cli("export", FIXTURE, "-o", tmp_path / ops, "--ops", ops).exit_code == 0
        document = json.loads(cli("generate", tmp_path / ops, "-p", PROMPT, "-n", 100, "--json").out)
        assert len(document["tokens"]) == 100
        texts[ops] = document["text"]
    assert texts["torch"] == texts["fused"] == texts["standard"]
    words = set(re.findall("[a-z]+", texts["torch"].lower()))
    known = set(re.findall("[a-z]+", (FIXTURE / "heldout.txt").read_text(encoding="utf-8").lower()))
    assert len(words) > 10
    assert len(words & known) >= 0.75 * len(words)


CHUNK_SIZES = [1, 7, 16, 33]


@pytest.fixture(scope="module", params=OPERATOR_SETS)
def session(
    request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> DecoderSession:
    out = tmp_path_factory.mktemp("fixture") / "out"
    return DecoderSession(export(checkpoint.config, checkpoint.weights, out, ops=request.param), threads=1)


@pytest.fixture(scope="module")
def parallel(checkpoint: Checkpoint, tokens: np.ndarray) -> np.ndarray:
    """Logits `[T, vocab]` of the full parallel form, without the clamp of scores that only this form knows: it moves
    logits by up to 1.0e-4 (`verify` calls it normalisation-epsilon)."""
    config = checkpoint.config
    scores = replace(config.score_normalization, clamp="none")
    free = load_model(replace(config, score_normalization=scores), checkpoint.weights, torch.float32)
    with torch.no_grad():
        return free(torch.from_numpy(tokens), form=retention_parallel).logits[0].numpy()


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_every_hand_off_equals_the_full_parallel_form(
    chunk_size: int, session: DecoderSession, parallel: np.ndarray, tokens: np.ndarray, tmp_path: Path
) -> None:
    length, file = 3 * chunk_size + 1, tmp_path / "state"
    near = {border + beside for border in range(0, length, chunk_size) for beside in (-1, 0, 1)}
    for split in range(1, length + 1) if chunk_size < 16 else sorted(near & {*range(1, length + 1)}):
        sequences = Sequences.start(session)
        sequences.feed([tokens[0, :split]], chunk_size=chunk_size)
        np.testing.assert_allclose(sequences.logits[0], parallel[split - 1], rtol=0, atol=GRAPH_FLOAT32)
        write_state(file, capture(sequences), force=True)
        loaded = read_state(file).sequences(session)
        for n in range(split, length):
            loaded.append(tokens[0, n : n + 1])
            np.testing.assert_allclose(loaded.logits[0], parallel[n], rtol=0, atol=GRAPH_FLOAT32)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_ragged_batches_equal_the_full_parallel_form_and_solo_runs(
    chunk_size: int, session: DecoderSession, parallel: np.ndarray, tokens: np.ndarray, model: RetNet
) -> None:
    lengths = sorted({1, 2, chunk_size, chunk_size + 1, 2 * chunk_size, 3 * chunk_size, 3 * chunk_size + 1})
    prompts = [tokens[0, :n].tolist() for n in lengths]
    state = session.new_state(len(prompts))
    logits = session.prefill(prompts, state, chunk_size=chunk_size)
    np.testing.assert_allclose(logits, parallel[np.array(lengths) - 1], rtol=0, atol=GRAPH_FLOAT32)
    together = generate(session, prompts, max_tokens=20, chunk_size=chunk_size)
    alone = [generate(session, [prompt], max_tokens=20, chunk_size=chunk_size).rows[0] for prompt in prompts]
    assert list(together.rows) == alone
    assert [list(row.tokens) for row in alone] == [torch_greedy(model, prompt, 20) for prompt in prompts]


@pytest.mark.slow
def test_a_long_prompt_is_a_small_file(session: DecoderSession, tmp_path: Path) -> None:
    text = (FIXTURE / "heldout.txt").read_text(encoding="utf-8")
    ids = np.array(load_tokenizer(FIXTURE / "tokenizer.json").encode(text).ids)
    ids = np.resize(ids, 20_000)
    sequences = Sequences.start(session)
    sequences.feed([ids], chunk_size=512)
    write_state(tmp_path / "long", capture(sequences))
    assert (tmp_path / "long").stat().st_size < 1e6
    loaded = read_state(tmp_path / "long").sequences(session)
    np.testing.assert_array_equal(loaded.logits, sequences.logits)
    for a, b in zip(loaded.state.numpy(), sequences.state.numpy(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert generate_from(loaded, [], Stopping(20)).rows == generate_from(sequences, [], Stopping(20)).rows


def test_float16_halves_the_weights_and_keeps_the_distribution(
    checkpoint: Checkpoint, model: RetNet, tokens: np.ndarray, tmp_path: Path
) -> None:
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.from_numpy(tokens), form=retention_recurrent).logits[0].double(), -1)
    out = export(checkpoint.config, checkpoint.weights, tmp_path / "out", dtype="float16")
    steps = run_steps(cpu_runner(out / STEP_FILE), tokens, zero_states(checkpoint.config, 1))
    logits = torch.from_numpy(np.concatenate([logits for logits, _ in steps]))
    found = torch.log_softmax(logits.double(), -1)
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < FLOAT16_KL
    assert float((expected.argmax(-1) == found.argmax(-1)).double().mean()) > 0.98
    plan = plan_export(checkpoint, dtype="float32", ops="fused")
    assert (out / "weights.data").stat().st_size < 0.55 * plan.weight_bytes + plan_tables(plan)


def plan_tables(plan: ExportPlan) -> int:
    return sum(tensor.stored_bytes for tensor in plan.tensors.values() if tensor.table is not None)


@pytest.mark.slow
def test_it_needs_fewer_bits_than_xz_on_held_out_text(model: RetNet, train: ModuleType) -> None:
    text = (FIXTURE / "heldout.txt").read_text(encoding="utf-8")
    packed = len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    assert train.bits_per_byte(model, text) < 8 * packed / len(text.encode())


def test_verify_uses_the_shipped_checkpoint_and_says_so(cli) -> None:
    result = cli("verify", "--modes", "parallel,recurrent,chunkwise", "--tokens", 32, "--json")
    assert result.exit_code == 0
    assert json.loads(result.out)["passed"] is True
    assert "using the shipped one" in result.err
