"""prefill.onnx against the three torch forms, float64, and onnx's reference evaluator; padding; the shared weights."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from retnet_tools.config import RetNetConfig
from retnet_tools.graph import contract
from retnet_tools.graph.ops import OPERATOR_SETS
from retnet_tools.model.retention import retention_chunkwise, retention_parallel, retention_recurrent
from retnet_tools.model.retnet import RetNetOutput, load_model
from retnet_tools.paper import language_model_decay, paper_decay
from retnet_tools.weights import Array, WeightSource
from tests.exports import check_border, cpu_runner, export, run_prefill, run_steps, zero_states
from tests.helpers import ABLATIONS, BASE, OTHER_LAYERS, random_source, random_tokens
from tests.pairs import pairwise
from tests.reference import reference_logits
from tests.tolerances import GRAPH_FLOAT16, GRAPH_FLOAT32, GRAPH_POSITIONS

OPS, DTYPES = list(OPERATOR_SETS), ("float32", "float16", "bfloat16")
CASES = list(itertools.product(ABLATIONS, OPS))
"""One half of these is held against every form, the other one fed ragged rows."""
FORMS = {
    "parallel": retention_parallel,
    "recurrent": retention_recurrent,
    "chunkwise": partial(retention_chunkwise, chunk_size=7),
}


@torch.no_grad()
def torch_run(config, source, ids, *, form=retention_recurrent, dtype=torch.float32, states=None, position=0):
    model = load_model(config, source, dtype)
    return model(torch.from_numpy(ids), form=form, states=states, position=position)


def without_clamp(config: RetNetConfig) -> RetNetConfig:
    """The parallel form alone knows the clamp of scores, which the head norm cancels only up to its epsilon."""
    return replace(config, score_normalization=replace(config.score_normalization, clamp="none"))


def random_states(config: RetNetConfig, batch: int, seed: int) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(state.shape, dtype=np.float32) for state in zero_states(config, batch)]


def check_states(found: list[Array], expected: list[torch.Tensor]) -> None:
    for state, reference in zip(found, expected, strict=True):
        scale = max(1.0, float(reference.abs().max()))
        np.testing.assert_allclose(state, reference.numpy(), rtol=0, atol=GRAPH_FLOAT32 * scale)


def check_rows(
    config: RetNetConfig,
    source: WeightSource,
    chunk: tuple[Array, list[Array]],
    ids: Array,
    lengths: Array,
    states: list[Array],
    position: Array,
) -> None:
    """A ragged chunk against the recurrence of each row alone."""
    logits, after = chunk
    for row, length in enumerate(lengths):
        expected: RetNetOutput = torch_run(
            config,
            source,
            ids[row : row + 1, :length],
            states=[torch.from_numpy(state[row : row + 1]) for state in states],
            position=int(position[row]),
        )
        np.testing.assert_allclose(logits[row], expected.logits[0, -1].numpy(), rtol=0, atol=GRAPH_FLOAT32)
        check_states([state[row : row + 1] for state in after], expected.states)


@pytest.mark.parametrize(("name", "ops"), [case for i, case in enumerate(CASES) if i % 4 in (0, 3)])
def test_a_chunk_equals_every_torch_form(name: str, ops: str, tmp_path: Path) -> None:
    config, source = without_clamp(ABLATIONS[name]), random_source(ABLATIONS[name], seed=3)
    run = cpu_runner(export(config, source, tmp_path / "out", ops=ops) / contract.PREFILL_FILE)
    for length in (1, 2, 97):
        ids = random_tokens(config, 2, length, seed=4)
        logits, states = run_prefill(run, ids, zero_states(config, 2))
        for form in FORMS.values():
            expected = torch_run(config, source, ids, form=form)
            np.testing.assert_allclose(logits, expected.logits[:, -1].numpy(), rtol=0, atol=GRAPH_FLOAT32)
            check_states(states, expected.states)


@pytest.mark.parametrize(("name", "ops"), [case for i, case in enumerate(CASES) if i % 4 in (1, 2)])
def test_ragged_rows_continue_their_states_like_each_row_alone(name: str, ops: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=5)
    rng = np.random.default_rng(6)
    lengths, position = rng.integers(1, 40, 4), rng.integers(0, 300, 4)
    ids, states = random_tokens(config, 4, int(lengths.max()) + 3, seed=7), random_states(config, 4, seed=8)
    run = cpu_runner(export(config, source, tmp_path / "out", ops=ops) / contract.PREFILL_FILE)
    chunk = run_prefill(run, ids, states, lengths, position)
    check_rows(config, source, chunk, ids, lengths, states, position)


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_reference_evaluator_runs_the_standard_graph(name: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=9)
    graph = export(config, source, tmp_path / "out", ops="standard") / contract.PREFILL_FILE
    evaluator = ReferenceEvaluator(str(graph))
    ids, states = random_tokens(config, 2, 9, seed=10), random_states(config, 2, seed=11)
    lengths, position = np.array([9, 5]), np.array([0, 70])
    chunk = run_prefill(lambda feeds: evaluator.run(None, feeds), ids, states, lengths, position)
    check_rows(config, source, chunk, ids, lengths, states, position)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", ["base", "no_decay", "key_decay", "stack", *OTHER_LAYERS])
def test_chunks_equal_a_float64_recurrence_written_apart(name: str, ops: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=12)
    ids = random_tokens(config, 2, 50, seed=13)
    expected = reference_logits(config, source, ids)
    run = cpu_runner(export(config, source, tmp_path / "out", ops=ops) / contract.PREFILL_FILE)
    states, start = zero_states(config, 2), 0
    for length in (1, 16, 2, 31):
        logits, states = run_prefill(run, ids[:, start : start + length], states, position=start)
        start += length
        np.testing.assert_allclose(logits, expected[:, start - 1], rtol=0, atol=GRAPH_FLOAT32)


@pytest.mark.parametrize("chunk_size", [32, 128, 512])
@pytest.mark.parametrize("decay", [paper_decay(8), language_model_decay(8), (0.0, -1e-9, -1e-5, -30.0) * 2])
def test_long_memories_stay_exact_at_any_chunk_size(decay: tuple[float, ...], chunk_size: int, tmp_path: Path) -> None:
    config = replace(
        BASE,
        hidden_size=64,
        key_dim=64,
        value_dim=96,
        num_heads=8,
        decay=decay,
        head_norm=replace(BASE.head_norm, eps=1e-5),
    )
    source, ids = random_source(config, seed=14), random_tokens(config, 1, 2048, seed=15)
    expected = torch_run(config, source, ids, dtype=torch.float64)
    run = cpu_runner(export(config, source, tmp_path / "out") / contract.PREFILL_FILE)
    states = zero_states(config, 1)
    for start in range(0, 2048, chunk_size):
        logits, states = run_prefill(run, ids[:, start : start + chunk_size], states, position=start)
        last = expected.logits[:, start + chunk_size - 1].numpy()
        np.testing.assert_allclose(logits, last, rtol=0, atol=GRAPH_FLOAT32)
    check_states(states, expected.states)


@pytest.mark.parametrize("name", ["base", "head_rotation_alone"])
@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("position", [10_000, 100_000, 1_000_003, 16_000_000, contract.MAX_POSITION - 30])
def test_far_positions_are_exact(position: int, name: str, ops: str, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    source = random_source(config, seed=16)
    run = cpu_runner(export(config, source, tmp_path / "out", ops=ops) / contract.PREFILL_FILE)
    ids, states = random_tokens(config, 1, 31, seed=17), random_states(config, 1, seed=18)
    wide = [torch.from_numpy(state).double() for state in states]
    expected = torch_run(config, source, ids, dtype=torch.float64, states=wide, position=position)
    logits, after = run_prefill(run, ids, states, position=position)
    np.testing.assert_allclose(logits, expected.logits[:, -1].numpy(), rtol=0, atol=GRAPH_POSITIONS)
    for state, reference in zip(after, expected.states, strict=True):
        np.testing.assert_allclose(state, reference.numpy(), rtol=0, atol=GRAPH_POSITIONS)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", ["base", "key_decay", "stack", "torchscale_2023", "no_decay", *OTHER_LAYERS])
def test_padding_never_leaks(name: str, ops: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=19)
    run = cpu_runner(export(config, source, tmp_path / "out", ops=ops) / contract.PREFILL_FILE)
    ids, states, lengths = (
        random_tokens(config, 3, 20, seed=20),
        random_states(config, 3, seed=21),
        np.array([20, 7, 0]),
    )
    position = np.array([0, contract.MAX_POSITION - 6, 5])
    logits, after = run_prefill(run, ids, states, lengths, position)
    other = ids.copy()
    for row, length in enumerate(lengths):
        other[row, length:] = -100 if config.has_vocabulary else np.nan
    logits_of_other, after_other = run_prefill(run, other, states, lengths, position)
    np.testing.assert_array_equal(logits, logits_of_other)
    for a, b, before in zip(after, after_other, states, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a[2], before[2])
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("ops", OPS)
def test_padding_is_exact_however_short_the_memory(ops: str, tmp_path: Path) -> None:
    """gamma^(n - T) of the padded tokens is beyond float32 from T = 11 on for log(gamma) = -9."""
    config = without_clamp(replace(BASE, decay=(-9.0, -5.0, -1.0, 0.0)))
    source, position = random_source(config, seed=19), np.array([0, 100, 7])
    run = cpu_runner(export(config, source, tmp_path / "out", ops=ops) / contract.PREFILL_FILE)
    ids, states, lengths = (
        random_tokens(config, 3, 40, seed=20),
        random_states(config, 3, seed=21),
        np.array([40, 3, 1]),
    )
    chunk = run_prefill(run, ids, states, lengths, position)
    check_rows(config, source, chunk, ids, lengths, states, position)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", ["base", "key_decay", "one_key_value_head", *OTHER_LAYERS])
def test_a_codeword_in_one_row_changes_no_other(name: str, ops: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=22)
    run = cpu_runner(export(config, source, tmp_path / "out", ops=ops) / contract.PREFILL_FILE)
    ids, lengths = random_tokens(config, 3, 20, seed=23), np.array([15, 20, 11])
    planted = ids.copy()
    planted[1, 4:8] = (ids[1, 4:8] + 17) % config.vocab_size
    results = [run_prefill(run, x, zero_states(config, 3), lengths) for x in (ids, planted)]
    for a, b in zip(*[[logits, *states] for logits, states in results], strict=True):
        np.testing.assert_array_equal(a[[0, 2]], b[[0, 2]])
        assert (a[1] != b[1]).any()


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", ["base", "torchscale_2023", "shared_head_norm", "key_decay", *OTHER_LAYERS])
def test_float16_weights_keep_float32_states(name: str, ops: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=24, dtype=np.float16)
    out = export(config, source, tmp_path / "out", ops=ops, dtype="float16")
    ids = random_tokens(config, 2, 64, seed=25)
    logits, states = run_prefill(cpu_runner(out / contract.PREFILL_FILE), ids, zero_states(config, 2))
    expected = torch_run(config, source, ids).logits[:, -1].numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=GRAPH_FLOAT16)
    assert logits.dtype == np.float32
    *_, (stepped, _) = run_steps(cpu_runner(out / contract.STEP_FILE), ids, zero_states(config, 2))
    np.testing.assert_allclose(logits, stepped, rtol=0, atol=GRAPH_FLOAT16)
    assert all(state.dtype == np.float32 for state in states)


@pytest.mark.parametrize(
    ("name", "dtype", "ops"),
    pairwise(
        ["base", "torchscale_2023", "tied", "key_decay", "stack", *OTHER_LAYERS],
        ["float32", "float16", "bfloat16"],
        OPS,
    ),
)
def test_the_checker_accepts_every_graph(name: str, dtype: str, ops: str, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    graph = export(config, random_source(config, 1), tmp_path / "out", ops=ops, dtype=dtype) / contract.PREFILL_FILE
    onnx.checker.check_model(str(graph), full_check=True)


@pytest.mark.parametrize("name", ["base", "stack"])
@pytest.mark.parametrize("ops", OPS)
def test_inputs_and_outputs_keep_the_contract(ops: str, name: str, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    model = onnx.load(export(config, random_source(config, 1), tmp_path / "out", ops=ops) / contract.PREFILL_FILE)
    check_border(model, contract.prefill_inputs(config, "float32"), contract.step_outputs(config, "float32"))


def all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [*graph.node, *(node for sub in inner for node in all_nodes(sub))]


@pytest.mark.parametrize("ops", OPS)
def test_both_graphs_share_every_stored_tensor(ops: str, tmp_path: Path) -> None:
    for name, config in ABLATIONS.items():
        out = export(config, random_source(config, 1), tmp_path / name, ops=ops)
        places = []
        for file in (contract.PREFILL_FILE, contract.STEP_FILE):
            model = onnx.load(out / file, load_external_data=False)
            stored = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
            places.append({t.name: [(e.key, e.value) for e in t.external_data] for t in stored})
            if ops == "standard":
                assert {node.domain for node in all_nodes(model.graph)} == {""}
            kinds = [node.op_type for node in all_nodes(model.graph)]
            walks = file == contract.STEP_FILE or bool(config.key_decay)
            assert kinds.count("LinearAttention") == (config.num_layers if walks and ops == "fused" else 0)
            walks = file == contract.PREFILL_FILE and bool(config.key_decay)
            assert kinds.count("Scan") == (config.num_layers if walks and ops == "standard" else 0)
        assert places[0] == places[1]
