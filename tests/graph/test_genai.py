"""model.onnx for onnxruntime-genai against the torch forms, float64, and onnx's reference evaluator, fed as that
runtime feeds it; padding; the shared weights."""

from __future__ import annotations

import itertools
import resource
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from retnet_tools.graph import contract
from retnet_tools.graph.decay import CHUNK_SIZE
from retnet_tools.graph.ops import OPERATOR_SETS
from retnet_tools.model.retention import retention_chunkwise, retention_parallel, retention_recurrent
from tests.exports import check_border, cpu_runner, export, run_genai, zero_states
from tests.graph.test_prefill import all_nodes, check_rows, check_states, random_states, torch_run, without_clamp
from tests.helpers import ABLATIONS, BASE, OTHER_LAYERS, random_source, random_tokens
from tests.pairs import pairwise
from tests.reference import reference_logits
from tests.tolerances import GRAPH_FLOAT16, GRAPH_FLOAT32, GRAPH_POSITIONS

OPS, DTYPES = list(OPERATOR_SETS), ("float32", "float16", "bfloat16")
NAMES = [name for name, config in ABLATIONS.items() if config.has_vocabulary]
FORMS = {
    "parallel": retention_parallel,
    "recurrent": retention_recurrent,
    "chunkwise": partial(retention_chunkwise, chunk_size=50),
}
CASES = list(itertools.product(NAMES, OPS))
"""One half of these is fed whole prompts, the other one ragged rows."""
LENGTHS = (1, 2, CHUNK_SIZE, 2 * CHUNK_SIZE + 9)


def genai_graph(config, source, out: Path, *, ops: str = "fused", dtype: str = "float32") -> Path:
    return export(config, source, out, ops=ops, dtype=dtype, target="genai") / contract.GENAI_FILE


@pytest.mark.parametrize(("name", "ops"), [case for i, case in enumerate(CASES) if i % 4 in (0, 3)])
def test_a_prompt_of_any_length_equals_every_torch_form(name: str, ops: str, tmp_path: Path) -> None:
    config, source = without_clamp(ABLATIONS[name]), random_source(ABLATIONS[name], seed=3)
    run = cpu_runner(genai_graph(config, source, tmp_path / "out", ops=ops))
    for length in LENGTHS:
        ids = random_tokens(config, 2, length, seed=4)
        logits, states = run_genai(run, config, ids, zero_states(config, 2))
        for form in FORMS.values():
            expected = torch_run(config, source, ids, form=form)
            np.testing.assert_allclose(logits, expected.logits[:, -1].numpy(), rtol=0, atol=GRAPH_FLOAT32)
            check_states(states, expected.states)


@pytest.mark.parametrize(("name", "ops"), [case for i, case in enumerate(CASES) if i % 4 in (1, 2)])
def test_ragged_rows_continue_their_states_like_each_row_alone(name: str, ops: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=5)
    lengths, position = np.array([1, CHUNK_SIZE + 30, CHUNK_SIZE, 40]), np.array([1, 250, 100_000, 0])
    ids, states = random_tokens(config, 4, CHUNK_SIZE + 33, seed=7), random_states(config, 4, seed=8)
    run = cpu_runner(genai_graph(config, source, tmp_path / "out", ops=ops))
    chunk = run_genai(run, config, ids, states, lengths, position)
    check_rows(config, source, chunk, ids, lengths, states, position)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", ["base", "key_decay", "torchscale_2023", "no_decay", *OTHER_LAYERS])
def test_a_prompt_then_steps_equals_a_float64_recurrence_written_apart(name: str, ops: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=12)
    ids = random_tokens(config, 2, CHUNK_SIZE + 20, seed=13)
    expected = reference_logits(config, source, ids)
    run = cpu_runner(genai_graph(config, source, tmp_path / "out", ops=ops))
    states, start = zero_states(config, 2), 0
    for length in (CHUNK_SIZE + 7, *[1] * 9, 4):
        logits, states = run_genai(run, config, ids[:, start : start + length], states, position=start)
        start += length
        np.testing.assert_allclose(logits, expected[:, start - 1], rtol=0, atol=GRAPH_FLOAT32)


@pytest.mark.parametrize(
    "name", ["base", "key_decay", "torchscale_2023", "shared_key_value_heads", "head_bias", *OTHER_LAYERS]
)
def test_the_reference_evaluator_runs_the_standard_graph(name: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=9)
    evaluator = ReferenceEvaluator(str(genai_graph(config, source, tmp_path / "out", ops="standard")))
    states, position = random_states(config, 2, seed=11), np.array([0, 70])
    for lengths in (np.array([1, 1]), np.array([9, 5]), np.array([CHUNK_SIZE + 2, 3])):
        ids = random_tokens(config, 2, int(lengths.max()), seed=10)
        chunk = run_genai(lambda feeds: evaluator.run(None, feeds), config, ids, states, lengths, position)
        check_rows(config, source, chunk, ids, lengths, states, position)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("position", [10_000, 1_000_003, contract.MAX_POSITION - 30])
def test_far_positions_are_exact(position: int, ops: str, tmp_path: Path) -> None:
    source = random_source(BASE, seed=16)
    run = cpu_runner(genai_graph(BASE, source, tmp_path / "out", ops=ops))
    ids, states = random_tokens(BASE, 1, 31, seed=17), random_states(BASE, 1, seed=18)
    wide = [torch.from_numpy(state).double() for state in states]
    expected = torch_run(BASE, source, ids, dtype=torch.float64, states=wide, position=position)
    _, after = run_genai(run, BASE, ids[:, :30], states, position=position)
    logits, after = run_genai(run, BASE, ids[:, 30:], after, position=position + 30)
    np.testing.assert_allclose(logits, expected.logits[:, -1].numpy(), rtol=0, atol=GRAPH_POSITIONS)
    for state, reference in zip(after, expected.states, strict=True):
        np.testing.assert_allclose(state, reference.numpy(), rtol=0, atol=GRAPH_POSITIONS)


@pytest.mark.parametrize("ops", OPS)
def test_what_stands_at_padding_changes_nothing(ops: str, tmp_path: Path) -> None:
    run = cpu_runner(genai_graph(BASE, random_source(BASE, seed=19), tmp_path / "out", ops=ops))
    ids, lengths = random_tokens(BASE, 3, CHUNK_SIZE + 10, seed=20), np.array([CHUNK_SIZE + 10, 7, 1])
    states, results = random_states(BASE, 3, seed=21), []
    for padding in (BASE.vocab_size, 5, -100):

        def feed(feeds: dict[str, np.ndarray], padding: int = padding) -> list[np.ndarray]:
            padded = feeds[contract.INPUT_IDS] == BASE.vocab_size
            return run({**feeds, contract.INPUT_IDS: np.where(padded, padding, feeds[contract.INPUT_IDS])})

        logits, after = run_genai(feed, BASE, ids, states, lengths)
        results.append([logits, *after])
    for values in zip(*results, strict=True):
        np.testing.assert_array_equal(values[0], values[1])
        np.testing.assert_array_equal(values[0], values[2])


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", ["base", "key_decay", *OTHER_LAYERS])
@pytest.mark.parametrize("length", [20, CHUNK_SIZE + 20])
def test_a_codeword_in_one_row_changes_no_other(length: int, name: str, ops: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=22)
    run = cpu_runner(genai_graph(config, source, tmp_path / "out", ops=ops))
    ids, lengths = random_tokens(config, 3, length, seed=23), np.array([15, length, 11])
    planted = ids.copy()
    planted[1, 4:8] = (ids[1, 4:8] + 17) % config.vocab_size
    results = [run_genai(run, config, x, zero_states(config, 3), lengths) for x in (ids, planted)]
    for a, b in zip(*[[logits, *states] for logits, states in results], strict=True):
        np.testing.assert_array_equal(a[[0, 2]], b[[0, 2]])
        assert (a[1] != b[1]).any()


@pytest.mark.parametrize("ops", OPS)
def test_a_row_that_has_ended_takes_the_padding_token_and_disturbs_no_other(ops: str, tmp_path: Path) -> None:
    run = cpu_runner(genai_graph(BASE, random_source(BASE, seed=24), tmp_path / "out", ops=ops))
    states, position = random_states(BASE, 2, seed=25), np.array([7, 9])
    ended = run_genai(run, BASE, np.array([[3], [BASE.vocab_size]]), states, position=position)
    running = run_genai(run, BASE, np.array([[3], [4]]), states, position=position)
    for a, b in zip([ended[0], *ended[1]], [running[0], *running[1]], strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        assert np.isfinite(a).all()


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", ["base", "torchscale_2023", "key_decay", *OTHER_LAYERS])
def test_float16_weights_keep_float32_states(name: str, ops: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=27, dtype=np.float16)
    run = cpu_runner(genai_graph(config, source, tmp_path / "out", ops=ops, dtype="float16"))
    ids, states = random_tokens(config, 2, 64, seed=28), zero_states(config, 2)
    expected = torch_run(config, source, ids).logits.numpy()
    for start, end in ((0, 63), (63, 64)):
        logits, states = run_genai(run, config, ids[:, start:end], states, position=start)
        np.testing.assert_allclose(logits, expected[:, end - 1], rtol=0, atol=GRAPH_FLOAT16)
    assert all(value.dtype == np.float32 for value in (logits, *states))


@pytest.mark.parametrize(
    ("name", "dtype", "ops"),
    pairwise(["base", "torchscale_2023", "tied", "key_decay", *OTHER_LAYERS], DTYPES, OPS),
)
def test_the_checker_accepts_every_graph(name: str, dtype: str, ops: str, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    graph = genai_graph(config, random_source(config, 1), tmp_path / "out", ops=ops, dtype=dtype)
    onnx.checker.check_model(str(graph), full_check=True)


@pytest.mark.parametrize("ops", OPS)
def test_inputs_and_outputs_keep_the_contract(ops: str, tmp_path: Path) -> None:
    model = onnx.load(genai_graph(BASE, random_source(BASE, 1), tmp_path / "out", ops=ops))
    check_border(model, contract.genai_inputs(BASE, "float32"), contract.genai_outputs(BASE, "float32"))


@pytest.mark.parametrize("name", ["base", "tied", "key_decay", *OTHER_LAYERS])
def test_weights_data_is_that_of_the_other_target(name: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], 2)
    folders = [export(config, source, tmp_path / target, target=target) for target in ("onnx", "genai")]
    a, b = ((folder / contract.WEIGHTS_FILE).read_bytes() for folder in folders)
    assert a == b


@pytest.mark.parametrize("ops", OPS)
def test_one_token_is_a_step_and_more_are_chunks(ops: str, tmp_path: Path) -> None:
    graph = onnx.load(genai_graph(BASE, random_source(BASE, 1), tmp_path / ops, ops=ops)).graph
    if ops == "standard":
        assert {node.domain for node in all_nodes(graph)} == {""}
    conditions = [node for node in graph.node if node.op_type == "If"]
    assert len(conditions) == BASE.num_layers
    for node in conditions:
        branches = {a.name: [inner.op_type for inner in all_nodes(a.g)] for a in node.attribute}
        assert branches["then_branch"].count("LinearAttention") == (ops == "fused")
        assert "Scan" not in branches["then_branch"]
        assert branches["else_branch"].count("Scan") == 1


def test_memory_is_linear_in_the_prompt(tmp_path: Path) -> None:
    config = replace(BASE, num_layers=1)
    run = cpu_runner(genai_graph(config, random_source(config, 1), tmp_path / "out"))
    ids, states = random_tokens(config, 1, 20_000, seed=29), zero_states(config, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    logits, after = run_genai(run, config, ids, states)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 0.1 * 4 * config.num_heads * ids.size**2
    for start in range(0, ids.size, 4000):
        expected, states = run_genai(run, config, ids[:, start : start + 4000], states, position=start)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=GRAPH_FLOAT32)
    check_states(after, [torch.from_numpy(state) for state in states])


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", ["base", "key_decay"])
def test_padding_before_or_between_tokens_or_a_leap_is_nan(name: str, ops: str, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    run = cpu_runner(genai_graph(config, random_source(config, 30), tmp_path / "out", ops=ops))
    positions = np.array([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2], [0, 1, 0, 2, 3], [0, 1, 2, 0, 0], [4, 5, 7, 8, 9]])
    feeds = {contract.INPUT_IDS: random_tokens(config, 5, 5, seed=31), contract.POSITION_IDS: positions}
    for i, state in enumerate(zero_states(config, 5)):
        feeds |= {contract.PAST_CONV_NAMES % i: np.zeros((5, 1, 1), np.float32), contract.PAST_NAMES % i: state}
    logits, *after = run(feeds)
    for found in (logits[..., : config.vocab_size], *after[: config.num_layers]):
        assert [bool(np.isnan(row).all()) for row in found] == [False, True, True, False, True]
        assert np.isfinite(found[[0, 3]]).all()
