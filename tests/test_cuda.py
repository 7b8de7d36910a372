"""Exports on a GPU: against torch, against the CPU provider, and against themselves without CUDA graphs."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retnet_tools.config import RetNetConfig
from retnet_tools.formats import open_checkpoint
from retnet_tools.graph.contract import GENAI_FILE, PREFILL_FILE, STEP_FILE
from retnet_tools.graph.ops import OPERATOR_SETS
from retnet_tools.model.retention import retention_recurrent
from retnet_tools.model.retnet import load_model
from retnet_tools.paper import paper_config
from retnet_tools.runtime import DecoderSession, Device, Sampling, Sequences, generate
from retnet_tools.runtime.onnx_session import node_placement, open_session
from retnet_tools.runtime.selftest import run_selftest
from retnet_tools.runtime.state_file import capture, read_state, write_state
from retnet_tools.weights import Array, WeightSource
from tests.cuda_device import DEVICE, DTYPES, ON_CPU, needs_cuda_graphs, why_not
from tests.exports import export, run_genai, zero_states
from tests.helpers import ABLATIONS, BASE, random_source, random_tokens
from tests.pairs import pairwise
from tests.quantized import decoded_source, quantize
from tests.reference import reference_logits
from tests.tolerances import CUDA_LOGITS, CUDA_QUANTIZED, CUDA_STATES, GRAPH_FLOAT32

pytestmark = pytest.mark.cuda
if why_not() is not None:
    pytest.skip(f"no GPU: {why_not()}", allow_module_level=True)

FIXTURE = Path(__file__).parent.parent / "fixtures" / "shakespeare"
HEADS = [(256, 512), (256, 432), (128, 256), (64, 128), (160, 320), (64, 54)]
LENGTHS = np.array([48, 1, 17])


def conditioned(config: RetNetConfig) -> RetNetConfig:
    """With an epsilon that bounds how much the head norm enlarges an output that nearly cancels."""
    return replace(config, head_norm=replace(config.head_norm, eps=1e-3))


def model(k: int, v: int) -> RetNetConfig:
    config = paper_config(vocab_size=61, hidden_size=2 * k, value_dim=2 * v, ffn_dim=64, num_layers=2, num_heads=2)
    return conditioned(config)


@torch.no_grad()
def torch_run(config: RetNetConfig, source: WeightSource, ids: Array) -> Any:
    return load_model(config, source, torch.float32)(torch.from_numpy(ids), form=retention_recurrent)


def stepped(session: DecoderSession, ids: Array) -> tuple[Array, list[Array]]:
    """Logits after each token, `[B, T, vocab]`, and the last states."""
    state = session.new_state(len(ids))
    logits = np.stack([session.step(ids[:, n], state) for n in range(ids.shape[1])], 1)
    return logits, state.numpy()


def check_states(states: list[Array], expected: list[Any], tolerance: float) -> None:
    for state, reference in zip(states, expected, strict=True):
        wide = np.asarray(reference, dtype=np.float64)
        np.testing.assert_allclose(state, wide, rtol=0, atol=tolerance * max(1.0, float(np.abs(wide).max())))


@pytest.mark.parametrize(
    ("name", "ops", "dtype"),
    dict.fromkeys((*itertools.product(["base"], OPERATOR_SETS, DTYPES), *pairwise(ABLATIONS, OPERATOR_SETS, DTYPES))),
)
def test_steps_and_prompts_are_those_of_torch(name: str, ops: str, dtype: str, tmp_path: Path) -> None:
    config = conditioned(ABLATIONS[name])
    source = random_source(config, 3)
    ids = random_tokens(config, len(LENGTHS), int(LENGTHS.max()), 4)
    expected = torch_run(config, source, ids)
    logits_of = expected.logits.numpy()
    session = DecoderSession(export(config, source, tmp_path / "out", ops=ops, dtype=dtype, device="cuda"), DEVICE, 1)
    logits, states = stepped(session, ids)
    np.testing.assert_allclose(logits, logits_of, rtol=0, atol=CUDA_LOGITS[dtype])
    check_states(states, [state.numpy() for state in expected.states], CUDA_STATES[dtype])
    for chunk in (16, 256):
        state = session.new_state(len(LENGTHS))
        found = session.prefill(ids, state, lengths=LENGTHS, chunk_size=chunk)
        rows = logits_of[np.arange(len(LENGTHS)), LENGTHS - 1]
        np.testing.assert_allclose(found, rows, rtol=0, atol=CUDA_LOGITS[dtype])
        np.testing.assert_array_equal(state.position, LENGTHS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ops", OPERATOR_SETS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_head_sizes(heads: tuple[int, int], ops: str, dtype: str, tmp_path: Path) -> None:
    config = model(*heads)
    source, ids = random_source(config, 5), random_tokens(config, 2, 40, 6)
    expected = torch_run(config, source, ids)
    session = DecoderSession(export(config, source, tmp_path / "out", ops=ops, dtype=dtype, device="cuda"), DEVICE, 1)
    logits, states = stepped(session, ids)
    np.testing.assert_allclose(logits, expected.logits.numpy(), rtol=0, atol=CUDA_LOGITS[dtype])
    check_states(states, [state.numpy() for state in expected.states], CUDA_STATES[dtype])
    state = session.new_state(2)
    found = session.prefill(ids, state, chunk_size=16)
    np.testing.assert_allclose(found, expected.logits[:, -1].numpy(), rtol=0, atol=CUDA_LOGITS[dtype])
    check_states(state.numpy(), states, CUDA_STATES[dtype])


@pytest.mark.parametrize("heads", [(256, 512), (256, 432), (8, 12)], ids=str)
def test_a_gamma_of_each_key_dimension(heads: tuple[int, int], tmp_path: Path) -> None:
    plain = model(*heads)
    normalization = replace(plain.score_normalization, by_decay=False)
    decay = tuple(-0.01 * i for i in range(heads[0] // 2))
    config = replace(plain, key_decay=decay, score_normalization=normalization)
    source, ids = random_source(config, 5), random_tokens(config, 2, 40, 6)
    expected = reference_logits(config, source, ids[:, :8])
    session = DecoderSession(export(config, source, tmp_path / "out", device="cuda"), DEVICE, 1)
    logits, _ = stepped(session, ids[:, :8])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=GRAPH_FLOAT32)
    found = session.prefill(ids[:, :8], session.new_state(2))
    np.testing.assert_allclose(found, expected[:, -1], rtol=0, atol=GRAPH_FLOAT32)
    long, short = (session.prefill(ids, session.new_state(2), chunk_size=size) for size in (40, 4))
    np.testing.assert_allclose(long, short, rtol=0, atol=GRAPH_FLOAT32)


@needs_cuda_graphs
@pytest.mark.parametrize("state_dtype", ["float32", "float16"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(256, 512), (256, 432), (160, 320)], ids=str)
def test_replayed_steps_are_bit_equal_to_eager_ones_over_1000_steps(
    heads: tuple[int, int], dtype: str, state_dtype: str, tmp_path: Path
) -> None:
    config = model(*heads)
    out = export(
        config, random_source(config, 5), tmp_path / "out", dtype=dtype, state_dtype=state_dtype, device="cuda"
    )
    captured, eager = (DecoderSession(out, DEVICE, cuda_graph=graph) for graph in (None, False))
    assert captured.eager_reason is None
    assert eager.eager_reason == "it was asked for"
    ids = random_tokens(config, 3, 1000, 6)
    states = [session.new_state(3) for session in (captured, eager)]
    for n in range(1000):
        own, other = (s.step(ids[:, n], state) for s, state in zip((captured, eager), states, strict=True))
        assert own is not None
        np.testing.assert_array_equal(own, other, err_msg=f"logits after {n + 1} tokens")
    for layer, (own, other) in enumerate(zip(*(state.numpy() for state in states), strict=True)):
        np.testing.assert_array_equal(own, other, err_msg=f"states of layer {layer}")


@needs_cuda_graphs
def test_states_take_turns_in_captured_graphs(tmp_path: Path) -> None:
    """Two states of a batch size, prompts in between, and one that moves into the buffers of one that is gone."""
    config = model(64, 128)
    out = export(config, random_source(config, 5), tmp_path / "out", device="cuda")
    session, eager = DecoderSession(out, DEVICE), DecoderSession(out, DEVICE, cuda_graph=False)
    ids = random_tokens(config, 2, 64, 6)
    expected, _ = stepped(eager, ids)
    for _ in range(3):
        states = [session.new_state(2) for _ in range(2)]
        for n in range(64):
            for state in states:
                feed = (session.prefill, ids[:, n : n + 1]) if n == 20 else (session.step, ids[:, n])
                found = feed[0](feed[1], state)
                np.testing.assert_array_equal(found, expected[:, n])
        del states, state


@needs_cuda_graphs
@pytest.mark.parametrize("state_dtype", ["float32", "float16"])
def test_batch_sizes_mixed_in_one_captured_session_are_what_they_are_eagerly(state_dtype: str, tmp_path: Path) -> None:
    """Kernels pick their form by the batch, cuBLAS among them; a replay must not meet what another size left behind."""
    config = conditioned(ABLATIONS["projection_bias"])
    out = export(config, random_source(config, 5), tmp_path / "out", state_dtype=state_dtype, device="cuda")
    ids, prompt = random_tokens(config, 8, 40, 6), random_tokens(config, 3, 30, 7)
    found = []
    for graph in (None, False):
        session = DecoderSession(out, DEVICE, cuda_graph=graph)
        assert (session.eager_reason is None) == (graph is None)
        one, eight = session.new_state(), session.new_state(8)
        logits = [session.step(ids[:1, n], one) for n in range(10)]
        logits += [session.step(ids[:, n], eight) for n in range(10)]
        logits += [session.prefill(prompt, session.new_state(3), chunk_size=16)]
        logits += [session.step(ids[:1, n], one) for n in range(10, 20)]
        logits += [session.prefill(ids[:, 10:27], eight, chunk_size=8)]
        for n in range(27, 40):
            logits += [session.step(ids[:, n], eight), session.step(ids[:1, n - 7], one)]
        found.append([*logits, *one.numpy(), *eight.numpy()])
    for number, (captured, eager) in enumerate(zip(*found, strict=True)):
        np.testing.assert_array_equal(captured, eager, err_msg=f"result {number}")


@needs_cuda_graphs
def test_a_batch_that_shrinks_from_8_to_1_gets_the_same_tokens_with_and_without_graphs(tmp_path: Path) -> None:
    config = conditioned(ABLATIONS["projection_bias"])
    out = export(config, random_source(config, 5), tmp_path / "out", device="cuda")
    prompts = [[int(token)] * (row + 1) for row, token in enumerate(random_tokens(config, 1, 8, 6)[0])]
    rows = [
        generate(
            DecoderSession(out, DEVICE, cuda_graph=graph),
            prompts,
            max_tokens=200,
            sampling=Sampling(temperature=1.0, seed=4),
            end_ids=range(3),
        ).rows
        for graph in (None, False)
    ]
    lengths = sorted(len(row.tokens) for row in rows[0])
    assert lengths[3] < lengths[-1]
    assert [row.tokens for row in rows[0]] == [row.tokens for row in rows[1]]


@pytest.mark.parametrize("kind", ["float32", "float16", "int8", "int4"])
def test_weights_that_both_graphs_share_are_those_that_each_loads(kind: str, tmp_path: Path) -> None:
    config, dtype = conditioned(BASE), kind if kind in DTYPES else "float16"
    out = export(config, random_source(config, 1), tmp_path / "float", dtype=dtype, device="cuda")
    if kind not in DTYPES:
        out = quantize(out, tmp_path / kind, kind, block_size=32, accuracy_level=0)
    ids, found = random_tokens(config, 2, 60, 6), []
    for prompts in (True, False):
        session = DecoderSession(out, DEVICE, 1, prompts=prompts)
        state = session.new_state(2)
        logits = [session.prefill(ids[:, :50], state, chunk_size=16)]
        logits += [session.step(ids[:, n], state) for n in range(50, 60)]
        found.append([*logits, *state.numpy()])
    for shared, own in zip(*found, strict=True):
        np.testing.assert_array_equal(shared, own)


@pytest.mark.parametrize("in_place", [True, False])
def test_steps_in_place_are_those_in_two_sets_of_buffers(in_place: bool, tmp_path: Path) -> None:
    config = model(256, 512)
    source, ids = random_source(config, 5), random_tokens(config, 2, 100, 6)
    out = export(config, source, tmp_path / "out", device="cuda")
    expected, _ = stepped(DecoderSession(out, DEVICE, 1, in_place=False, cuda_graph=False), ids)
    found, _ = stepped(DecoderSession(out, DEVICE, 1, in_place=in_place), ids)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_ragged_batch_is_what_it_is_alone(dtype: str, tmp_path: Path) -> None:
    config, tolerance = model(256, 512), CUDA_LOGITS[dtype]
    out = export(config, random_source(config, 5), tmp_path / "out", dtype=dtype, device="cuda")
    session, ids = DecoderSession(out, DEVICE, 1), random_tokens(config, 1, 300, 6)[0]
    prompts = [ids[:length] for length in (300, 1, 129, 128, 2)]
    together = session.prefill(prompts, session.new_state(len(prompts)), chunk_size=128)
    for row, prompt in zip(together, prompts, strict=True):
        alone = session.prefill([prompt], session.new_state(), chunk_size=128)[0]
        np.testing.assert_allclose(row, alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize("state_dtype", ["float32", "float16"])
def test_states_go_from_device_to_file_to_device(state_dtype: str, tmp_path: Path) -> None:
    config = model(256, 432)
    source, ids = random_source(config, 5), random_tokens(config, 2, 30, 6)
    out = export(config, source, tmp_path / "out", state_dtype=state_dtype, device="cuda")
    device, cpu = DecoderSession(out, DEVICE, 1), DecoderSession(out, Device("cpu"), 1)
    sequences = Sequences.start(device, 2, Sampling())
    sequences.feed(list(ids))
    write_state(tmp_path / "state", capture(sequences))
    for session, tolerance in ((device, 0.0), (cpu, CUDA_LOGITS["float32"])):
        loaded = read_state(tmp_path / "state").sequences(session)
        here, there = (np.asarray(s.session.step(ids[:, 0], s.state)) for s in (sequences.select([0, 1]), loaded))
        np.testing.assert_allclose(there, here, rtol=0, atol=tolerance)


def test_rows_are_chosen_on_the_device(tmp_path: Path) -> None:
    config = model(64, 128)
    session = DecoderSession(export(config, random_source(config, 5), tmp_path / "out", device="cuda"), DEVICE, 1)
    state = session.new_state(3)
    session.prefill(random_tokens(config, 3, 20, 6), state)
    for layer, chosen in zip(state.numpy(), state.select([2, 0, 2, 1]).numpy(), strict=True):
        np.testing.assert_array_equal(chosen, layer[[2, 0, 2, 1]])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("ops", OPERATOR_SETS)
@pytest.mark.parametrize("name", ["base", "tied", "projection_bias"])
def test_quantized_weights_are_what_they_decode_to(
    name: str, ops: str, bits: str, symmetric: bool, tmp_path: Path
) -> None:
    config = conditioned(ABLATIONS[name])
    parent = export(config, random_source(config, 1), tmp_path / "float", ops=ops, device="cuda")
    level = {"accuracy_level": 0} if ops == "fused" else {}
    out = quantize(parent, tmp_path / bits, bits, block_size=32, symmetric=symmetric, **level)
    ids = random_tokens(config, 2, 8, 6)
    expected = reference_logits(config, decoded_source(config, out / STEP_FILE), ids)
    session = DecoderSession(out, DEVICE, 1)
    logits, _ = stepped(session, ids)
    tolerance = 0.5 if ON_CPU and ops == "standard" else CUDA_QUANTIZED
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)
    found = session.prefill(ids, session.new_state(2))
    np.testing.assert_allclose(found, expected[:, -1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "float32"])
def test_quantized_weights_with_half_activations(dtype: str, bits: str, tmp_path: Path) -> None:
    config = conditioned(BASE)
    parent = export(config, random_source(config, 1), tmp_path / "float", dtype=dtype, device="cuda")
    out = quantize(parent, tmp_path / bits, bits, block_size=32, accuracy_level=0)
    ids = random_tokens(config, 2, 8, 6)
    expected = reference_logits(config, decoded_source(config, out / STEP_FILE), ids)
    logits, _ = stepped(DecoderSession(out, DEVICE, 1), ids)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=CUDA_LOGITS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(256, 512), (8, 12)], ids=str)
def test_the_graph_for_onnxruntime_genai(heads: tuple[int, int], dtype: str, tmp_path: Path) -> None:
    config = model(*heads)
    source, ids = random_source(config, 5), random_tokens(config, 2, 300, 6)
    out = export(config, source, tmp_path / "out", target="genai", dtype=dtype, device="cuda")
    session = open_session(out / GENAI_FILE, DEVICE, 1)
    expected = torch_run(config, source, ids).logits.numpy()
    run = lambda feeds: session.run(None, feeds)  # noqa: E731
    logits, states = run_genai(run, config, ids[:, :-1], zero_states(config, 2), np.array([299, 140]))
    rows = np.stack([expected[0, 298], expected[1, 139]])
    np.testing.assert_allclose(logits, rows, rtol=0, atol=CUDA_LOGITS[dtype])
    logits, _ = run_genai(run, config, ids[:1, -1:], [state[:1] for state in states], position=299)
    np.testing.assert_allclose(logits, expected[:1, -1], rtol=0, atol=CUDA_LOGITS[dtype])


@needs_cuda_graphs
def test_onnxruntime_genai_gives_our_greedy_tokens(tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    opened = open_checkpoint(FIXTURE)
    folders = {
        target: export(opened.config, opened.weights, tmp_path / target, target=target, device="cuda")
        for target in ("onnx", "genai")
    }
    prompt = [11, 500, 7, 42]
    ours = generate(DecoderSession(folders["onnx"], DEVICE), [prompt], max_tokens=100).rows[0].tokens
    parameters = og.GeneratorParams(og.Model(str(folders["genai"])))
    parameters.set_search_options(max_length=len(prompt) + 100)
    generator = og.Generator(og.Model(str(folders["genai"])), parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    found = generator.get_sequence(0)[len(prompt) :]
    assert list(found)[: len(ours)] == list(ours)


def test_the_trained_model_writes_what_it_writes_on_the_cpu(tmp_path: Path) -> None:
    opened = open_checkpoint(FIXTURE)
    out = export(opened.config, opened.weights, tmp_path / "out", device="cuda")
    prompts = [[11, 500, 7, 42], [3, 9]]
    here, there = (
        generate(DecoderSession(out, device, 1), prompts, max_tokens=200).rows for device in (DEVICE, Device("cpu"))
    )
    assert [row.tokens for row in here] == [row.tokens for row in there]


@needs_cuda_graphs
@pytest.mark.parametrize("ops", OPERATOR_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_node_of_a_step_is_on_the_cpu(dtype: str, ops: str, tmp_path: Path) -> None:
    out = export(
        model(256, 512), random_source(model(256, 512), 1), tmp_path / "out", dtype=dtype, ops=ops, device="cuda"
    )
    assert set(node_placement(open_session(out / STEP_FILE, DEVICE)).counts) == {"CUDA"}
    outside = node_placement(open_session(out / PREFILL_FILE, DEVICE)).outside(DEVICE)
    assert set(outside.values()) <= {"Concat", "Gather"}


def test_the_self_test_passes() -> None:
    (result,) = run_selftest([DEVICE])
    assert result.passed, result.problem
    assert ON_CPU or result.eager_reason is None
