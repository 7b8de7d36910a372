"""What stands around the real tokens of a row, and inputs that mean nothing: exact, refused, or not a number."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from retnet_tools.config import RetNetConfig
from retnet_tools.graph import contract
from retnet_tools.graph.ops import OPERATOR_SETS
from retnet_tools.weights import Array
from tests.exports import cpu_runner, export, run_prefill, run_steps, zero_states
from tests.graph.test_prefill import check_states, random_states, torch_run
from tests.helpers import ABLATIONS, BASE, OTHER_LAYERS, random_source, random_tokens
from tests.quantized import quantize
from tests.reference import reference_logits
from tests.tolerances import GRAPH_FLOAT32

OPS = list(OPERATOR_SETS)
Run = Callable[[dict[str, Array]], list[Array]]

AROUND = np.array([[1] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1], [0, 0, 1, 1, 1, 1, 0, 0, 0], [0] * 9, [1] * 4 + [0] * 5])
"""Real tokens on the left, on the right, in the middle, and none."""


def feeds_of(config: RetNetConfig, ids: Array, mask: Array, positions: Array, states: list[Array]) -> dict[str, Array]:
    """Inputs of prefill.onnx."""
    return {
        contract.INPUT_IDS if config.has_vocabulary else contract.INPUTS_EMBEDS: ids,
        contract.POSITION_IDS: positions,
        contract.ATTENTION_MASK: mask,
        **{contract.PAST_NAMES % i: state for i, state in enumerate(states)},
    }


def counted(mask: Array) -> Array:
    """Positions as transformers makes them: real tokens so far less one, and 1 at padding."""
    return np.where(mask == 1, np.cumsum(mask, axis=1) - 1, 1)


def unpadded(ids: Array, mask: Array, row: int) -> Array:
    return ids[row : row + 1, mask[row] == 1]


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", ["base", "no_decay", "key_decay", "stack", "shared_key_value_heads", *OTHER_LAYERS])
def test_a_padded_row_equals_a_float64_recurrence_of_its_tokens_alone(name: str, ops: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=1)
    run = cpu_runner(export(config, source, tmp_path / "out", ops=ops) / contract.PREFILL_FILE)
    ids = random_tokens(config, len(AROUND), AROUND.shape[1], seed=2)
    logits, *_ = run(feeds_of(config, ids, AROUND, counted(AROUND), zero_states(config, len(AROUND))))
    assert np.isfinite(logits).all()
    for row in np.flatnonzero(AROUND.any(1)):
        expected = reference_logits(config, source, unpadded(ids, AROUND, row))[0, -1]
        np.testing.assert_allclose(logits[row, 0], expected, rtol=0, atol=GRAPH_FLOAT32)


@pytest.mark.parametrize(
    ("ops", "evaluator"), [("fused", "onnxruntime"), ("standard", "onnxruntime"), ("standard", "onnx")]
)
@pytest.mark.parametrize("name", ["base", "key_decay", "head_rotation"])
def test_states_of_padded_rows_stand_at_their_last_real_token(
    name: str, ops: str, evaluator: str, tmp_path: Path
) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=3)
    graph = export(config, source, tmp_path / "out", ops=ops) / contract.PREFILL_FILE
    run: Run = cpu_runner(graph) if evaluator == "onnxruntime" else partial(ReferenceEvaluator(str(graph)).run, None)
    ids, states = (
        random_tokens(config, len(AROUND), AROUND.shape[1], seed=4),
        random_states(config, len(AROUND), seed=5),
    )
    position = np.array([3, 0, 70, 16_000_000, 9, 4095])
    logits, *after = run(feeds_of(config, ids, AROUND, counted(AROUND) + position[:, None], states))
    for row, start in enumerate(position):
        own = [state[row : row + 1] for state in after]
        before = [torch.from_numpy(state[row : row + 1]) for state in states]
        if not AROUND[row].any():
            for state, same in zip(own, before, strict=True):
                np.testing.assert_array_equal(state, same)
            continue
        tokens = unpadded(ids, AROUND, row)
        wide = [state.double() for state in before]
        expected = torch_run(config, source, tokens, dtype=torch.float64, states=wide, position=int(start))
        np.testing.assert_allclose(logits[row, 0], expected.logits[0, -1], rtol=0, atol=GRAPH_FLOAT32)
        check_states(own, expected.states)


@pytest.mark.parametrize("ops", OPS)
def test_left_padding_is_exact_however_short_the_memory_and_whatever_stands_there(ops: str, tmp_path: Path) -> None:
    """gamma^-1 of a token before the first would be beyond float32 after ten."""
    config = RetNetConfig(**{**vars(BASE), "decay": (-9.0, -5.0, -1.0, 0.0)})
    out = export(config, random_source(config, seed=6), tmp_path / "out", ops=ops)
    run, ids = cpu_runner(out / contract.PREFILL_FILE), random_tokens(config, 1, 60, seed=7)
    mask = (np.arange(60) >= 40).astype(np.int64)[None]
    states = random_states(config, 1, seed=8)
    alone = run_prefill(run, ids[:, 40:], states, position=5)
    for padding in (0, -100, 2**40):
        tokens = np.where(mask == 1, ids, padding)
        positions = np.where(mask == 1, np.arange(60) - 35, padding)
        logits, *after = run(feeds_of(config, tokens, mask, positions, states))
        np.testing.assert_allclose(logits[:, 0], alone[0], rtol=0, atol=GRAPH_FLOAT32)
        check_states(after, [torch.from_numpy(state) for state in alone[1]])


WRONG_MASKS = [
    [1, 1, 0, 1, 1, 1, 0, 0],
    [0, 1, 0, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 2, 0, 0, 0],
    [2] * 8,
    [1, 1, 1, -1, 0, 0, 0, 0],
    [-1] * 8,
    [3, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 2**40],
]
WRONG_POSITIONS = [
    [0, 1, 2, 3, 4, 5, 6, 8],
    [1, 1, 2, 3, 4, 5, 6, 7],
    [7] * 8,
    [7, 6, 5, 4, 3, 2, 1, 0],
    [5, *range(7)],
]


@pytest.mark.parametrize(("state_dtype", "weights"), [("float32", "float32"), ("float16", "int8"), ("float32", "int4")])
@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", ["base", "key_decay", "stack", "no_head_norm", "relu_ffn", "feature_map_relu"])
def test_rows_that_cannot_be_right_are_nan_and_move_no_other(
    name: str, ops: str, state_dtype: str, weights: str, tmp_path: Path
) -> None:
    config, order = ABLATIONS[name], np.arange(8)
    out = export(config, random_source(config, 30), tmp_path / "out", ops=ops, state_dtype=state_dtype)
    if weights != "float32":
        out = quantize(out, tmp_path / weights, weights, block_size=32)
    run = cpu_runner(out / contract.PREFILL_FILE)
    healthy = np.array([[1] * 8, [1] * 3 + [0] * 5, [0] * 8])
    wrong = len(WRONG_MASKS) + len(WRONG_POSITIONS)
    masks = np.concatenate([healthy, WRONG_MASKS, np.ones((len(WRONG_POSITIONS), 8), np.int64)])
    positions = np.concatenate([np.tile(order, (3 + len(WRONG_MASKS), 1)), WRONG_POSITIONS])
    ids, states = random_tokens(config, 3 + wrong, 8, seed=31), zero_states(config, 3 + wrong, np.dtype(state_dtype))
    found = run(feeds_of(config, ids, masks, positions, states))
    masks[3:], positions[3:] = 1, order
    expected = run(feeds_of(config, ids, masks, positions, states))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a[:3], b[:3])
        assert np.isnan(a[3:]).all()
        assert np.isfinite(b).all()


WRONG = [("id", -1), ("id", -61), ("id", 61), ("id", 62), ("id", 1 << 33), ("position", -1), ("position", -5000)]
WRONG += [("position", contract.MAX_POSITION + 1), ("position", -(1 << 62)), ("position", 1 << 62)]


def planted(kind: str, value: int, length: int) -> tuple[Array, Array]:
    """Ids and positions of two rows, of which the second has a wrong one at its end."""
    ids, positions = np.full((2, length), 3), np.tile(np.arange(length), (2, 1))
    if kind == "id":
        ids[1, -1] = value
    else:
        positions[1] = value - length + 1 + np.arange(length)
    return ids, positions


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("file", [contract.PREFILL_FILE, contract.STEP_FILE, contract.GENAI_FILE])
def test_an_id_or_a_position_that_the_model_lacks_is_refused(file: str, ops: str, weights: str, tmp_path: Path) -> None:
    """Also from the end of a table, where -1 is its last row to an ONNX lookup, and where codes are looked up."""
    target = "genai" if file == contract.GENAI_FILE else "onnx"
    out = export(BASE, random_source(BASE, 30), tmp_path / "out", ops=ops, target=target)
    if weights != "float32":
        out = quantize(out, tmp_path / weights, weights, block_size=32)
    run = cpu_runner(out / file)
    for length in [1] if file == contract.STEP_FILE else [1, 3]:
        for kind, value in WRONG:
            if target == "genai" and (kind, value) == ("id", contract.padding_id(BASE)):
                continue
            with pytest.raises(Exception, match="out of data bounds"):
                run(inputs(file, *planted(kind, value, length)))


def inputs(file: str, ids: Array, positions: Array) -> dict[str, Array]:
    """Of any graph of `BASE`, at zero states."""
    feeds = feeds_of(BASE, ids, np.ones_like(ids), positions, zero_states(BASE, len(ids)))
    if file != contract.PREFILL_FILE:
        del feeds[contract.ATTENTION_MASK]
    if file == contract.GENAI_FILE:
        conv = np.zeros((len(ids), 1, 1), np.float32)
        feeds |= {contract.PAST_CONV_NAMES % i: conv for i in range(BASE.num_layers)}
    return feeds


class Gather(OpRun):
    """As ONNX Runtime's CUDA kernel has it: zeros where there is no such row."""

    def _run(self, data: Array, indices: Array, axis: int | None = None) -> tuple[Array]:
        rows = np.where(indices < 0, indices + data.shape[axis or 0], indices)
        inside = (rows >= 0) & (rows < data.shape[axis or 0])
        found = np.take(data, np.where(inside, rows, 0), axis=axis or 0)
        if inside.all():
            return (found,)
        assert axis in (0, None)
        return (np.where(inside.reshape(inside.shape + (1,) * (data.ndim - 1)), found, np.zeros_like(found)),)


@pytest.mark.parametrize("file", [contract.PREFILL_FILE, contract.STEP_FILE])
def test_where_no_lookup_is_checked_the_row_is_nan(file: str, tmp_path: Path) -> None:
    out = export(BASE, random_source(BASE, 30), tmp_path / "out", ops="standard", device="cuda")
    evaluator = ReferenceEvaluator(str(out / file), new_ops=[Gather])
    for kind, value in WRONG:
        for found in evaluator.run(None, inputs(file, *planted(kind, value, 1 if file == contract.STEP_FILE else 3))):
            assert np.isfinite(found[0]).all()
            assert np.isnan(found[1]).all()


@pytest.mark.parametrize("ops", OPS)
def test_a_state_that_is_no_number_stays_in_its_row(ops: str, tmp_path: Path) -> None:
    out = export(BASE, random_source(BASE, 30), tmp_path / "out", ops=ops)
    states, ids = random_states(BASE, 2, seed=9), random_tokens(BASE, 2, 1, seed=10)
    states[0][1] = np.nan
    logits, after = next(run_steps(cpu_runner(out / contract.STEP_FILE), ids, states))
    results = [(logits, *after)]
    logits, after = run_prefill(cpu_runner(out / contract.PREFILL_FILE), ids, states)
    results.append((logits, *after))
    for result in results:
        for found in result:
            assert np.isfinite(found[0]).all()
            assert np.isnan(found[1]).all()
