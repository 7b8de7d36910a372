"""decoder.onnx: a step where one token is fed and a chunk where more are, with logits wherever they are asked for."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto
from onnx.reference import ReferenceEvaluator

from retnet_tools.config import RetNetConfig
from retnet_tools.graph import contract
from retnet_tools.graph.ops import OPERATOR_SETS
from retnet_tools.model.retention import retention_parallel
from retnet_tools.weights import Array
from tests.exports import check_border, cpu_runner, export, run_decoder, run_steps, zero_states
from tests.graph.test_padding import AROUND, WRONG, WRONG_MASKS, WRONG_POSITIONS, Gather, Run, planted
from tests.graph.test_prefill import all_nodes, check_states, random_states, torch_run, without_clamp
from tests.helpers import ABLATIONS, BASE, OTHER_LAYERS, random_source, random_tokens
from tests.pairs import pairwise
from tests.quantized import quantize
from tests.reference import reference_logits
from tests.tolerances import FLOAT16_STATES, GRAPH_FLOAT16, GRAPH_FLOAT32

OPS = list(OPERATOR_SETS)
KINDS = ["base", "key_decay", "stack", "shared_key_value_heads", "no_decay", "torchscale_2023", *OTHER_LAYERS]
CASES = list(itertools.product(ABLATIONS, OPS))
"""One half of these is fed token by token, the other one asked for logits of whole chunks."""
PLACES = [list(range(12)), [11], [5, 0, 5, 11, 5], [-1, -12, 3, -2]]
"""All, one, some several times and out of order, and counted from the end."""


def decoder(out: Path) -> Run:
    return cpu_runner(out / contract.DECODER_FILE)


def torch_rows(
    config: RetNetConfig, source, ids: Array, states: list[Array], position: Array
) -> list[tuple[Array, list[torch.Tensor]]]:
    """The float64 recurrence of each row alone: logits `[T, vocab]` and states after it."""
    rows = []
    for row, start in enumerate(position):
        wide = [torch.from_numpy(state[row : row + 1]).double() for state in states]
        one = torch_run(config, source, ids[row : row + 1], dtype=torch.float64, states=wide, position=int(start))
        rows.append((one.logits[0].numpy(), one.states))
    return rows


@pytest.mark.parametrize(("name", "ops"), [c for i, c in enumerate(CASES) if i % 4 in (0, 3) or c[0] in KINDS])
def test_one_token_is_a_step_wherever_its_row_stands(name: str, ops: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=51)
    run = decoder(export(config, source, tmp_path / "out", ops=ops))
    ids, states = random_tokens(config, 3, 4, seed=52), random_states(config, 3, seed=53)
    position = np.array([0, 4094, 16_000_000])
    expected, after = torch_rows(config, source, ids, states, position), states
    for n in range(4):
        logits, after = run_decoder(run, ids[:, n : n + 1], after, np.zeros(1), position=position + n)
        assert logits.shape[:2] == (3, 1)
        for row, (wide, _) in enumerate(expected):
            np.testing.assert_allclose(logits[row, 0], wide[n], rtol=0, atol=GRAPH_FLOAT32)
    for row, (_, wide) in enumerate(expected):
        check_states([state[row : row + 1] for state in after], wide)


@pytest.mark.parametrize(("name", "ops"), [case for i, case in enumerate(CASES) if i % 4 in (1, 2)])
def test_logits_stand_at_the_places_asked_for(name: str, ops: str, tmp_path: Path) -> None:
    """Of the float64 parallel form, Eq. 5 written out over all tokens."""
    config, source = without_clamp(ABLATIONS[name]), random_source(ABLATIONS[name], seed=54)
    ids = random_tokens(config, 2, 12, seed=55)
    expected = torch_run(config, source, ids, form=retention_parallel, dtype=torch.float64)
    run = decoder(export(config, source, tmp_path / "out", ops=ops))
    for indices in PLACES:
        logits, states = run_decoder(run, ids, zero_states(config, 2), np.array(indices))
        np.testing.assert_allclose(logits, expected.logits[:, indices].numpy(), rtol=0, atol=GRAPH_FLOAT32)
        check_states(states, expected.states)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", ["key_decay", "head_rotation", "head_key_decay_alone", "syncdoth_first", "base"])
def test_each_row_has_places_of_its_own_in_a_recurrence_written_apart(name: str, ops: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=56)
    ids = random_tokens(config, 3, 21, seed=57)
    expected = reference_logits(config, source, ids)
    run, states, start = decoder(export(config, source, tmp_path / "out", ops=ops)), zero_states(config, 3), 0
    for length, indices in ((1, [[0], [-1], [0]]), (13, [[12, 0], [3, 3], [-13, -2]]), (7, [[6, 5], [0, 6], [1, -3]])):
        chunk, places = ids[:, start : start + length], np.array(indices)
        logits, states = run_decoder(run, chunk, states, places, position=start)
        found = np.take_along_axis(expected[:, start : start + length], places[:, :, None] % length, axis=1)
        np.testing.assert_allclose(logits, found, rtol=0, atol=GRAPH_FLOAT32)
        start += length


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", KINDS)
def test_padding_on_either_side_moves_nothing(name: str, ops: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=58)
    run = decoder(export(config, source, tmp_path / "out", ops=ops))
    batch, length = AROUND.shape
    ids, states = random_tokens(config, batch, length, seed=59), random_states(config, batch, seed=60)
    position = np.array([3, 0, 70, 16_000_000, 9, 4095])
    logits, after = run_decoder(run, ids, states, np.arange(length), mask=AROUND, position=position)
    padding = AROUND == 0
    other = np.where(padding if ids.ndim == 2 else padding[:, :, None], -100 if ids.ndim == 2 else np.nan, ids)
    again = run_decoder(run, other.astype(ids.dtype), states, np.arange(length), mask=AROUND, position=position)
    np.testing.assert_array_equal(again[0][~padding], logits[~padding])
    for row, start in enumerate(position):
        own, before = ([state[row : row + 1] for state in some] for some in (after, states))
        for state, same in zip(own, [state[row : row + 1] for state in again[1]], strict=True):
            np.testing.assert_array_equal(state, same)
        if not AROUND[row].any():
            for state, same in zip(own, before, strict=True):
                np.testing.assert_array_equal(state, same)
            continue
        real = ids[row : row + 1, ~padding[row]]
        ((expected, wide),) = torch_rows(config, source, real, before, np.array([start]))
        np.testing.assert_allclose(logits[row, ~padding[row]], expected, rtol=0, atol=GRAPH_FLOAT32)
        check_states(own, wide)


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_reference_evaluator_runs_both_branches_of_the_standard_graph(name: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=61)
    graph = export(config, source, tmp_path / "out", ops="standard") / contract.DECODER_FILE
    run = partial(ReferenceEvaluator(str(graph)).run, None)
    ids, position = random_tokens(config, 2, 7, seed=62), np.array([0, 70])
    states = random_states(config, 2, seed=63)
    expected = torch_rows(config, source, ids, states, position)
    first, between = run_decoder(run, ids[:, :1], states, np.zeros(1), position=position)
    rest, after = run_decoder(run, ids[:, 1:], between, np.array([5, 0, -3]), position=position + 1)
    for row, (wide, end) in enumerate(expected):
        found = np.concatenate([first[row], rest[row]])
        np.testing.assert_allclose(found, wide[[0, 6, 1, 4]], rtol=0, atol=GRAPH_FLOAT32)
        check_states([state[row : row + 1] for state in after], end)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", ["base", "key_decay", "shared_key_value_heads", "stack", *OTHER_LAYERS])
def test_float16_states_hold_the_scaled_sum_in_both_branches(name: str, ops: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=64)
    run = decoder(export(config, source, tmp_path / "out", ops=ops, state_dtype="float16"))
    ids = random_tokens(config, 2, 40, seed=65)
    scales = np.array(contract.state_scale(config, "float16"))[:, None, None]
    expected = torch_run(config, source, ids, dtype=torch.float64)
    chunk, of_chunk = run_decoder(run, ids, zero_states(config, 2, np.float16), np.arange(40))
    # The first chunk reads no state that was rounded.
    np.testing.assert_allclose(chunk, expected.logits.numpy(), rtol=0, atol=GRAPH_FLOAT32)
    states = zero_states(config, 2, np.float16)
    for n in range(40):
        _, states = run_decoder(run, ids[:, n : n + 1], states, np.zeros(1), position=n)
    for found in (of_chunk, states):
        for state, wide in zip(found, expected.states, strict=True):
            assert state.dtype == np.float16
            scaled = wide.numpy() * scales
            assert np.abs(state - scaled).max() <= FLOAT16_STATES["paper"] * np.abs(scaled).max()


@pytest.mark.parametrize(("dtype", "ops", "name"), pairwise(["float16", "int8", "int4"], OPS, ["base", "key_decay"]))
def test_other_weights_give_what_their_own_steps_give(dtype: str, ops: str, name: str, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    out = export(
        config,
        random_source(config, seed=66),
        tmp_path / "out",
        ops=ops,
        dtype="float16" if "f" in dtype else "float32",
    )
    if dtype.startswith("int"):
        out = quantize(out, tmp_path / dtype, dtype, block_size=32)
    ids = random_tokens(config, 2, 9, seed=67)
    run, step = (cpu_runner(out / file, exact=True) for file in (contract.DECODER_FILE, contract.STEP_FILE))
    stepped = np.stack([logits for logits, _ in run_steps(step, ids, zero_states(config, 2))], axis=1)
    chunk, states = run_decoder(run, ids[:, :8], zero_states(config, 2), np.arange(8))
    last, _ = run_decoder(run, ids[:, 8:], states, np.zeros(1), position=8)
    np.testing.assert_allclose(np.concatenate([chunk, last], axis=1), stepped, rtol=0, atol=GRAPH_FLOAT16)


@pytest.mark.parametrize(("state_dtype", "weights"), [("float32", "float32"), ("float16", "int8")])
@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", ["base", "key_decay", "stack", "no_head_norm", "relu_ffn", "feature_map_relu"])
def test_a_masked_token_alone_is_nan_in_its_row_and_in_no_other(
    name: str, ops: str, state_dtype: str, weights: str, tmp_path: Path
) -> None:
    config = ABLATIONS[name]
    out = export(config, random_source(config, 68), tmp_path / "out", ops=ops, state_dtype=state_dtype)
    if weights != "float32":
        out = quantize(out, tmp_path / weights, weights, block_size=32)
    run, mask = decoder(out), np.array([[1], [0], [1], [2], [-1]])
    ids, states = random_tokens(config, 5, 1, seed=69), zero_states(config, 5, np.dtype(state_dtype))
    logits, after = run_decoder(run, ids, states, np.zeros(1), mask=mask)
    whole, healthy = run_decoder(run, ids, states, np.zeros(1))
    for found, expected in zip((logits, *after), (whole, *healthy), strict=True):
        np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])
        assert np.isfinite(expected).all()
        assert np.isnan(found[[1, 3, 4]]).all()


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", ["base", "key_decay", "stack"])
def test_rows_of_a_chunk_that_cannot_be_right_are_nan_and_move_no_other(name: str, ops: str, tmp_path: Path) -> None:
    config, wrong = ABLATIONS[name], len(WRONG_MASKS) + len(WRONG_POSITIONS)
    run = decoder(export(config, random_source(config, 70), tmp_path / "out", ops=ops))
    masks = np.concatenate([[[1] * 8, [1] * 3 + [0] * 5], WRONG_MASKS, np.ones((len(WRONG_POSITIONS), 8), np.int64)])
    positions = np.concatenate([np.tile(np.arange(8), (2 + len(WRONG_MASKS), 1)), WRONG_POSITIONS])
    ids, states = random_tokens(config, 2 + wrong, 8, seed=71), zero_states(config, 2 + wrong)
    indices = np.zeros((2 + wrong, 1), np.int64)
    logits, *after = run(feeds(config, ids, masks, positions, indices, states))
    masks[2:], positions[2:] = 1, np.arange(8)
    whole, *healthy = run(feeds(config, ids, masks, positions, indices, states))
    for found, expected in zip((logits, *after), (whole, *healthy), strict=True):
        np.testing.assert_array_equal(found[:2], expected[:2])
        assert np.isnan(found[2:]).all()
        assert np.isfinite(expected).all()


def feeds(
    config: RetNetConfig, ids: Array, mask: Array, positions: Array, indices: Array, states: list[Array]
) -> dict[str, Array]:
    return {
        contract.INPUT_IDS if config.has_vocabulary else contract.INPUTS_EMBEDS: ids,
        contract.POSITION_IDS: positions,
        contract.ATTENTION_MASK: mask,
        contract.LOGITS_INDICES: indices,
        **{contract.PAST_NAMES % i: state for i, state in enumerate(states)},
    }


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("ops", OPS)
def test_ids_positions_and_places_that_the_model_lacks_end_the_call(ops: str, weights: str, tmp_path: Path) -> None:
    out = export(BASE, random_source(BASE, 72), tmp_path / "out", ops=ops)
    if weights != "float32":
        out = quantize(out, tmp_path / weights, weights, block_size=32)
    run = decoder(out)
    for length in (1, 3):
        for kind, value in WRONG:
            ids, positions = planted(kind, value, length)
            given = (ids, np.ones_like(ids), positions, np.zeros((2, 1), np.int64), zero_states(BASE, 2))
            with pytest.raises(Exception, match="out of data bounds"):
                run(feeds(BASE, *given))
        for place in (length, -length - 1, 1 << 40):
            with pytest.raises(Exception, match="invalid ind"):
                run_decoder(run, random_tokens(BASE, 2, length, 73), zero_states(BASE, 2), np.array([0, place]))


def test_where_no_lookup_is_checked_the_row_is_nan(tmp_path: Path) -> None:
    out = export(BASE, random_source(BASE, 74), tmp_path / "out", ops="standard", device="cuda")
    evaluator = ReferenceEvaluator(str(out / contract.DECODER_FILE), new_ops=[Gather])
    for kind, value in WRONG:
        for length in (1, 3):
            ids, positions = planted(kind, value, length)
            given = (ids, np.ones_like(ids), positions, np.zeros((2, 1), np.int64), zero_states(BASE, 2))
            for found in evaluator.run(None, feeds(BASE, *given)):
                assert np.isfinite(found[0]).all()
                assert np.isnan(found[1]).all()


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("length", [1, 5])
def test_a_state_that_is_no_number_stays_in_its_row(length: int, ops: str, tmp_path: Path) -> None:
    run = decoder(export(BASE, random_source(BASE, 75), tmp_path / "out", ops=ops))
    states = random_states(BASE, 2, seed=76)
    states[0][1] = np.nan
    logits, after = run_decoder(run, random_tokens(BASE, 2, length, seed=77), states, np.arange(length))
    for found in (logits, *after):
        assert np.isfinite(found[0]).all()
        assert np.isnan(found[1]).all()


@pytest.mark.parametrize(("ops", "name", "state_dtype"), pairwise(OPS, KINDS, ["float32", "float16"]))
def test_a_step_may_write_states_where_it_reads_them(ops: str, name: str, state_dtype: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=78)
    out = export(config, source, tmp_path / "out", ops=ops, state_dtype=state_dtype)
    ids, states = random_tokens(config, 3, 20, seed=79), zero_states(config, 3, np.dtype(state_dtype))
    expected = run_steps(cpu_runner(out / contract.STEP_FILE), ids, [state.copy() for state in states])
    session = onnxruntime.InferenceSession(str(out / contract.DECODER_FILE), providers=["CPUExecutionProvider"])
    for n, (logits, after) in enumerate(expected):
        given = (ids[:, n : n + 1], np.ones((3, 1), np.int64), np.full((3, 1), n), np.zeros((3, 1), np.int64), states)
        binding = session.io_binding()
        for input_name, array in feeds(config, *given).items():
            binding.bind_cpu_input(input_name, array)
        binding.bind_output(contract.LOGITS if config.has_vocabulary else contract.HIDDEN_STATES)
        for i, state in enumerate(states):
            binding.bind_output(contract.PRESENT_NAMES % i, "cpu", 0, state.dtype, list(state.shape), state.ctypes.data)
        session.run_with_iobinding(binding)
        np.testing.assert_allclose(binding.copy_outputs_to_cpu()[0][:, 0], logits, rtol=0, atol=GRAPH_FLOAT32)
        for own, other in zip(states, after, strict=True):
            np.testing.assert_allclose(own.astype(np.float64), other, rtol=0, atol=2 * GRAPH_FLOAT32)


def model_of(name: str, ops: str, folder: Path, weights: str = "float32") -> onnx.ModelProto:
    config = ABLATIONS[name]
    out = export(config, random_source(config, 80), folder / "out", ops=ops)
    if weights != "float32":
        out = quantize(out, folder / weights, weights, block_size=32)
    return onnx.load(out / contract.DECODER_FILE, load_external_data=False)


def inner_graphs(graph: GraphProto) -> list[GraphProto]:
    """The graphs inside nodes, at any depth."""
    own = [a.g for node in graph.node for a in node.attribute if a.type == AttributeProto.GRAPH]
    return [*own, *(deeper for inner in own for deeper in inner_graphs(inner))]


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", KINDS)
def test_shapes_alone_decide_the_branch(name: str, ops: str, tmp_path: Path) -> None:
    """A value from a device would be waited for at every layer."""
    model = model_of(name, ops, tmp_path)
    makers = {value: node for node in all_nodes(model.graph) for value in node.output}
    given = {value.name for value in model.graph.input}

    def comes_from_shapes(value: str) -> bool:
        node: NodeProto | None = makers.get(value)
        if node is None:
            return value not in given
        return node.op_type == "Shape" or all(comes_from_shapes(source) for source in node.input)

    branches = [node for node in all_nodes(model.graph) if node.op_type == "If"]
    assert len(branches) == 1 + ABLATIONS[name].num_layers
    assert {comes_from_shapes(node.input[0]) for node in branches} == {True}
    assert not comes_from_shapes(model.graph.output[0].name)


@pytest.mark.parametrize(("ops", "weights", "name"), pairwise(OPS, ["float32", "int8", "int4"], KINDS))
def test_weights_stand_outside_the_branches(ops: str, weights: str, name: str, tmp_path: Path) -> None:
    """A session packs what a branch multiplies by once for each branch."""
    model = model_of(name, ops, tmp_path, weights)
    stored = {t.name for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL}
    inner = inner_graphs(model.graph)
    read = {value for graph in inner for node in graph.node for value in node.input}
    assert stored
    assert not stored & read
    assert not any(graph.initializer for graph in inner)


@pytest.mark.parametrize(("dtype", "name", "ops"), pairwise(["float32", "float16", "bfloat16"], KINDS, OPS))
def test_the_checker_accepts_the_graph_and_it_keeps_the_contract(
    dtype: str, name: str, ops: str, tmp_path: Path
) -> None:
    config = ABLATIONS[name]
    graph = export(config, random_source(config, 81), tmp_path / "out", ops=ops, dtype=dtype) / contract.DECODER_FILE
    onnx.checker.check_model(str(graph), full_check=True)
    model = onnx.load(graph, load_external_data=False)
    check_border(model, contract.decoder_inputs(config, "float32"), contract.decoder_outputs(config, "float32"))
