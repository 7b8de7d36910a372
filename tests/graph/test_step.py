"""step.onnx against the torch recurrent form, float64, and onnx's reference evaluator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from retnet_tools.config import BlockNorm
from retnet_tools.errors import InputError
from retnet_tools.graph import contract
from retnet_tools.graph.ops import OPERATOR_SETS
from retnet_tools.model.retention import retention_recurrent
from retnet_tools.model.retnet import load_model
from tests.exports import check_border, cpu_runner, export, run_steps, zero_states
from tests.helpers import ABLATIONS, BASE, OTHER_LAYERS, MemorySource, random_source, random_tokens
from tests.pairs import pairwise
from tests.tolerances import GRAPH_FLOAT16, GRAPH_FLOAT32, GRAPH_POSITIONS

OPS, DTYPES = list(OPERATOR_SETS), ("float32", "float16", "bfloat16")


@torch.no_grad()
def torch_logits(config, source, ids, dtype=torch.float32, states=None, position=0):
    model = load_model(config, source, dtype)
    return model(torch.from_numpy(ids), form=retention_recurrent, states=states, position=position)


def half_ulp_movement(config, source, ids):
    """How far logits of each token move in float64 when every weight moves by up to half a float32 ulp, `[B, T]`.

    A head whose output nearly cancels is amplified by its norm: there no float32 computation can be closer than this.
    """
    rng, exact = np.random.default_rng(0), torch_logits(config, source, ids, torch.float64).logits.numpy()
    movements = []
    for _ in range(3):
        moved = {
            name: array.astype(np.float64) * (1 + rng.uniform(-1, 1, array.shape) * 2.0**-24)
            for name, array in source.tensors.items()
        }
        logits = torch_logits(config, MemorySource(moved), ids, torch.float64).logits.numpy()
        movements.append(np.abs(logits - exact).max(-1))
    return np.max(movements, 0)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", ABLATIONS)
def test_step_equals_the_torch_recurrent_form_over_256_tokens(name: str, ops: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=3)
    ids = random_tokens(config, 2, 256, seed=4)
    expected = torch_logits(config, source, ids)
    run = cpu_runner(export(config, source, tmp_path / "out", ops=ops) / contract.STEP_FILE)
    errors = []
    for n, (logits, after) in enumerate(run_steps(run, ids, zero_states(config, 2))):
        errors.append(np.abs(logits - expected.logits[:, n].numpy()).max(-1))
    if np.max(errors) > GRAPH_FLOAT32:
        assert (np.stack(errors, 1) <= GRAPH_FLOAT32 + 2 * half_ulp_movement(config, source, ids)).all()
    for state, reference in zip(after, expected.states, strict=True):
        scale = max(1.0, float(reference.abs().max()))
        np.testing.assert_allclose(state, reference.numpy(), rtol=0, atol=GRAPH_FLOAT32 * scale)


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_reference_evaluator_runs_the_standard_graph(name: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=5)
    ids = random_tokens(config, 2, 6, seed=6)
    graph = export(config, source, tmp_path / "out", ops="standard") / contract.STEP_FILE
    evaluator = ReferenceEvaluator(str(graph))
    expected = torch_logits(config, source, ids).logits.numpy()
    for n, (logits, _) in enumerate(run_steps(lambda feeds: evaluator.run(None, feeds), ids, zero_states(config, 2))):
        np.testing.assert_allclose(logits, expected[:, n], rtol=0, atol=GRAPH_FLOAT32)


@pytest.mark.parametrize(
    ("name", "dtype", "ops"),
    pairwise(["base", "torchscale_2023", "tied", *OTHER_LAYERS], DTYPES, OPS),
)
def test_the_checker_accepts_every_graph(name: str, dtype: str, ops: str, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    graph = export(config, random_source(config, 1), tmp_path / "out", ops=ops, dtype=dtype) / contract.STEP_FILE
    onnx.checker.check_model(str(graph), full_check=True)


@pytest.mark.parametrize("ops", OPS)
def test_rows_may_stand_at_different_positions(ops: str, tmp_path: Path) -> None:
    source = random_source(BASE, seed=7)
    run = cpu_runner(export(BASE, source, tmp_path / "out", ops=ops) / contract.STEP_FILE)
    ids = random_tokens(BASE, 2, 8, seed=8)
    prefix = random_tokens(BASE, 1, 5, seed=9)
    *_, (_, short) = run_steps(run, prefix, zero_states(BASE, 1))
    mixed = [np.concatenate([zero, state]) for zero, state in zip(zero_states(BASE, 1), short, strict=True)]
    together = [logits for logits, _ in run_steps(run, ids, mixed, position=np.array([0, 5]))]
    alone = [
        [logits for logits, _ in run_steps(run, ids[:1], zero_states(BASE, 1))],
        [logits for logits, _ in run_steps(run, ids[1:], short, position=5)],
    ]
    for n in range(8):
        for row in range(2):
            np.testing.assert_allclose(together[n][row], alone[row][n][0], rtol=0, atol=GRAPH_FLOAT32)


@pytest.mark.parametrize("name", ["base", "head_rotation_alone"])
@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("position", [10_000, 100_000, 1_000_003, 16_000_000, contract.MAX_POSITION - 8])
def test_far_positions_are_exact(position: int, name: str, ops: str, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    source = random_source(config, seed=10)
    run = cpu_runner(export(config, source, tmp_path / "out", ops=ops) / contract.STEP_FILE)
    ids = random_tokens(config, 1, 8, seed=11)
    rng = np.random.default_rng(12)
    states = [rng.standard_normal(state.shape) for state in zero_states(config, 1)]
    expected = torch_logits(
        config, source, ids, torch.float64, states=[torch.from_numpy(state) for state in states], position=position
    )
    narrow = [state.astype(np.float32) for state in states]
    for n, (logits, after) in enumerate(run_steps(run, ids, narrow, position=position)):
        np.testing.assert_allclose(logits, expected.logits[:, n].numpy(), rtol=0, atol=GRAPH_POSITIONS)
    for state, reference in zip(after, expected.states, strict=True):
        np.testing.assert_allclose(state, reference.numpy(), rtol=0, atol=GRAPH_POSITIONS)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", ["base", "torchscale_2023", "shared_head_norm", *OTHER_LAYERS])
def test_float16_weights_keep_float32_states(name: str, ops: str, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    source = random_source(config, seed=13, dtype=np.float16)
    ids = random_tokens(config, 2, 64, seed=14)
    expected = torch_logits(config, source, ids)
    run = cpu_runner(export(config, source, tmp_path / "out", ops=ops, dtype="float16") / contract.STEP_FILE)
    for n, (logits, after) in enumerate(run_steps(run, ids, zero_states(config, 2))):
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected.logits[:, n].numpy(), rtol=0, atol=GRAPH_FLOAT16)
    assert all(state.dtype == np.float32 for state in after)


def test_the_reference_evaluator_runs_bfloat16(tmp_path: Path) -> None:
    source = random_source(BASE, seed=15)
    graph = export(BASE, source, tmp_path / "out", ops="standard", dtype="bfloat16") / contract.STEP_FILE
    evaluator = ReferenceEvaluator(str(graph))
    ids = random_tokens(BASE, 1, 4, seed=16)
    expected = torch_logits(BASE, source, ids, torch.bfloat16).logits.float().numpy()
    exact = torch_logits(BASE, source, ids).logits.numpy()
    rounding = np.abs(expected - exact).max()
    for n, (logits, _) in enumerate(run_steps(lambda feeds: evaluator.run(None, feeds), ids, zero_states(BASE, 1))):
        assert np.abs(logits - exact[:, n]).max() < 2 * rounding


@pytest.mark.parametrize("ops", OPS)
def test_inputs_and_outputs_keep_the_contract(ops: str, tmp_path: Path) -> None:
    model = onnx.load(export(BASE, random_source(BASE, 1), tmp_path / "out", ops=ops) / contract.STEP_FILE)
    check_border(model, contract.step_inputs(BASE, "float32"), contract.step_outputs(BASE, "float32"))


def test_standard_graphs_use_the_onnx_domain_only(tmp_path: Path) -> None:
    for name, config in ABLATIONS.items():
        model = onnx.load(
            export(config, random_source(config, 1), tmp_path / name, ops="standard") / contract.STEP_FILE,
            load_external_data=False,
        )
        assert {node.domain for node in model.graph.node} == {""}
        assert [opset.domain for opset in model.opset_import] == [""]


def test_fused_graphs_run_retention_in_one_node_a_layer(tmp_path: Path) -> None:
    model = onnx.load(export(BASE, random_source(BASE, 1), tmp_path / "out") / contract.STEP_FILE)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("LinearAttention") == BASE.num_layers
    # One merged q, k, v, gate product, one out, one merged gate and up, one down; and the logits.
    assert kinds.count("Gemm") == 4 * BASE.num_layers + 1


@pytest.mark.parametrize("ops", OPS)
def test_a_zero_vector_stays_zero_at_epsilon_zero(ops: str, tmp_path: Path) -> None:
    config = replace(BASE.with_head_norm_eps(0.0), block_norm=BlockNorm("rms", 0.0))
    source = random_source(config, seed=17)
    source.tensors["layers.0.retention.v_proj.weight"][:] = 0
    ids = random_tokens(config, 1, 8, seed=18)
    expected = torch_logits(config, source, ids).logits.numpy()
    assert np.isfinite(expected).all()
    run = cpu_runner(export(config, source, tmp_path / "out", ops=ops) / contract.STEP_FILE)
    for n, (logits, _) in enumerate(run_steps(run, ids, zero_states(config, 1))):
        np.testing.assert_allclose(logits, expected[:, n], rtol=0, atol=GRAPH_FLOAT32)


def test_a_scale_beyond_float16_is_refused(tmp_path: Path) -> None:
    config = replace(BASE, embedding_scale=1e5)
    with pytest.raises(InputError, match=r"scale 100000.*float16 cannot hold"):
        export(config, random_source(config, 1), tmp_path / "out", dtype="float16")
