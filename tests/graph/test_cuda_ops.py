"""Graphs for CUDA run on the CPU provider with the results of those for the CPU, at RetNet's own head sizes too."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import InputError, UsageError
from retnet_tools.graph.contract import DEVICES, GENAI_FILE, OPERATORS, PREFILL_FILE, STEP_FILE
from retnet_tools.graph.export import plan_of_export
from retnet_tools.graph.folder import load_graph
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.graph.ops import OPERATOR_SETS
from retnet_tools.graph.targets import TARGET_DEVICES, operator_set, target_device
from retnet_tools.paper import paper_config, paper_rotary_frequencies
from tests.exports import cpu_runner, export, run_genai, run_prefill, run_steps, zero_states
from tests.fake_gpu import FakeGpu, needs_fake_gpu
from tests.helpers import ABLATIONS, BASE, OTHER_LAYERS, random_source, random_tokens
from tests.pairs import pairwise
from tests.quantized import quantize
from tests.reference import reference_logits
from tests.tolerances import GRAPH_FLOAT16, GRAPH_FLOAT32

HEADS = {(256, 512): 2, (256, 432): 1, (160, 320): None, (128, 64): 1, (64, 54): 1, (192, 96): 3, (8, 12): None}
"""K x V, and the parts of a head that LinearAttention gets in a step; None where matrix products do it."""


def model(k: int, v: int, **changes: object) -> RetNetConfig:
    """Two layers of two heads of this size."""
    config = paper_config(vocab_size=61, hidden_size=2 * k, value_dim=2 * v, ffn_dim=40, num_layers=2, num_heads=2)
    return replace(config, **changes)


def with_key_decay(k: int, v: int) -> RetNetConfig:
    normalization = replace(model(k, v).score_normalization, by_decay=False)
    return model(k, v, key_decay=tuple(-0.01 * i for i in range(k // 2)), score_normalization=normalization)


def linear_attentions(graph: Path) -> list[tuple[int, int]]:
    """q and kv heads of each LinearAttention, subgraphs included."""
    nodes = (node for node in load_graph(graph).all_nodes() if node.op_type == "LinearAttention")
    return [tuple(node.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads")) for node in nodes]


@pytest.mark.parametrize("ops", OPERATOR_SETS)
@pytest.mark.parametrize("name", ABLATIONS)
def test_step_and_prefill_are_those_for_the_cpu(name: str, ops: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], 3)
    ids, results = random_tokens(config, 2, 7, 4), []
    for device in TARGET_DEVICES:
        out = export(config, source, tmp_path / device, ops=ops, device=device)
        stepped = list(run_steps(cpu_runner(out / STEP_FILE), ids, zero_states(config, 2)))
        logits, states = run_prefill(cpu_runner(out / PREFILL_FILE), ids, zero_states(config, 2), np.array([7, 4]))
        results.append([*(row for row, _ in stepped), *stepped[-1][1], logits, *states])
    for own, other in zip(*results, strict=True):
        np.testing.assert_allclose(own, other, rtol=0, atol=GRAPH_FLOAT32)


@pytest.mark.parametrize("dtype", ["float16"])
@pytest.mark.parametrize("name", ["base", "feature_map_elu", "feature_map_leaky_relu", "key_decay", *OTHER_LAYERS])
def test_float16_is_as_close(name: str, dtype: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], 3)
    if name == "syncdoth_first":
        # In a head whose output nearly cancels, rounding the weights alone moves the logits by 0.06.
        config = config.with_head_norm_eps(1e-3)
    ids = random_tokens(config, 2, 6, 4)
    out = export(config, source, tmp_path / "out", dtype=dtype, device="cuda")
    steps = run_steps(cpu_runner(out / STEP_FILE), ids, zero_states(config, 2))
    found = np.stack([logits for logits, _ in steps], 1)
    np.testing.assert_allclose(found, reference_logits(config, source, ids), rtol=0, atol=GRAPH_FLOAT16)


@pytest.mark.parametrize("ops", OPERATOR_SETS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_head_sizes_against_float64(heads: tuple[int, int], ops: str, tmp_path: Path) -> None:
    config = model(*heads)
    source, ids = random_source(config, 5), random_tokens(config, 2, 5, 6)
    out = export(config, source, tmp_path / "out", ops=ops, device="cuda")
    expected = reference_logits(config, source, ids)
    steps = list(run_steps(cpu_runner(out / STEP_FILE), ids, zero_states(config, 2)))
    found = np.stack([logits for logits, _ in steps], 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=GRAPH_FLOAT32)
    logits, states = run_prefill(cpu_runner(out / PREFILL_FILE), ids[:, :3], zero_states(config, 2))
    np.testing.assert_allclose(logits, expected[:, 2], rtol=0, atol=GRAPH_FLOAT32)
    # A prompt's states go on in steps.
    *_, (logits, states) = run_steps(cpu_runner(out / STEP_FILE), ids[:, 3:], states, position=3)
    np.testing.assert_allclose(logits, expected[:, -1], rtol=0, atol=GRAPH_FLOAT32)
    for state, stepped in zip(states, steps[-1][1], strict=True):
        np.testing.assert_allclose(state, stepped, rtol=0, atol=GRAPH_FLOAT32)
    parts = None if ops == "standard" else HEADS[heads]
    assert linear_attentions(out / STEP_FILE) == ([] if parts is None else [(2 * parts, 2 * parts)] * 2)
    assert linear_attentions(out / PREFILL_FILE) == []


@pytest.mark.parametrize(("heads", "parts"), [((256, 432), 8), ((256, 512), 2), ((8, 12), 1), ((4, 1028), None)])
def test_a_gamma_of_each_key_dimension_walks_the_tokens(
    heads: tuple[int, int], parts: int | None, tmp_path: Path
) -> None:
    config = with_key_decay(*heads)
    source, ids = random_source(config, 5), random_tokens(config, 2, 5, 6)
    out = export(config, source, tmp_path / "out", device="cuda")
    expected = reference_logits(config, source, ids)
    lengths = np.array([5, 2])
    logits, _ = run_prefill(cpu_runner(out / PREFILL_FILE), ids, zero_states(config, 2), lengths)
    np.testing.assert_allclose(logits, [expected[0, 4], expected[1, 1]], rtol=0, atol=GRAPH_FLOAT32)
    steps = run_steps(cpu_runner(out / STEP_FILE), ids, zero_states(config, 2))
    found = np.stack([logits for logits, _ in steps], 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=GRAPH_FLOAT32)
    assert linear_attentions(out / PREFILL_FILE) == ([] if parts is None else [(2 * parts, 2 * parts)] * 2)


WIDE_KEYS = replace(
    paper_config(vocab_size=61, hidden_size=2048, value_dim=64, ffn_dim=40, num_layers=1, num_heads=8),
    rotary_frequencies=paper_rotary_frequencies(2048),
)
"""The largest heads of published models, each with a rotation of its own: 2048 key dimensions in a token."""


def test_heads_that_each_rotate_on_their_own_are_no_larger_for_the_kernel(tmp_path: Path) -> None:
    """ONNX Runtime's CUDA kernel of RotaryEmbedding takes a head of one block of threads, 1024 dimensions."""
    source, ids = random_source(WIDE_KEYS, 5), random_tokens(WIDE_KEYS, 2, 5, 6)
    out = export(WIDE_KEYS, source, tmp_path / "out", device="cuda")
    expected = reference_logits(WIDE_KEYS, source, ids)
    logits, _ = run_prefill(cpu_runner(out / PREFILL_FILE), ids, zero_states(WIDE_KEYS, 2), np.array([5, 2]))
    np.testing.assert_allclose(logits, [expected[0, 4], expected[1, 1]], rtol=0, atol=GRAPH_FLOAT32)
    for graph in (STEP_FILE, PREFILL_FILE):
        model = onnx.load(out / graph, load_external_data=False)
        values = onnx.shape_inference.infer_shapes(model).graph.value_info
        shapes = {value.name: value.type.tensor_type.shape.dim for value in values}
        inputs = [node.input for node in model.graph.node if node.op_type == "RotaryEmbedding"]
        assert [shapes[x][-1].dim_value for x, *_ in inputs] == [256, 256]


@pytest.mark.parametrize("heads", [(256, 512), (256, 432), (8, 12)], ids=str)
def test_the_graph_for_onnxruntime_genai(heads: tuple[int, int], tmp_path: Path) -> None:
    config = model(*heads)
    source, ids = random_source(config, 5), random_tokens(config, 2, 5, 6)
    out = export(config, source, tmp_path / "out", target="genai", device="cuda")
    expected, run = reference_logits(config, source, ids), cpu_runner(out / GENAI_FILE)
    logits, states = run_genai(run, config, ids[:, :4], zero_states(config, 2), np.array([4, 3]))
    np.testing.assert_allclose(logits, [expected[0, 3], expected[1, 2]], rtol=0, atol=GRAPH_FLOAT32)
    logits, _ = run_genai(run, config, ids[:1, 4:], [state[:1] for state in states], position=4)
    np.testing.assert_allclose(logits, expected[:1, 4], rtol=0, atol=GRAPH_FLOAT32)
    settings = (out / "genai_config.json").read_text()
    assert '"cuda"' in settings
    assert '"use_tf32": "0"' in settings


RUN = """
import json, sys
from pathlib import Path
import numpy as np
from retnet_tools.runtime import DecoderSession, Device
found = {}
for folder in sys.argv[1:]:
    session = DecoderSession(Path(folder), Device("cuda"))
    state = session.new_state(2)
    width = int(session._input.shape[-1])
    tokens = np.ones((2, 7), int) if session.manifest.config.has_vocabulary else np.ones((2, 7, width), "f4")
    try:
        session.prefill(tokens, state, lengths=[7, 3])
        for _ in range(6):
            session.step(tokens[:, 0], state)
        found[folder] = session.eager_reason
    except Exception as error:
        found[folder] = str(error)
print(json.dumps(found))
"""


@needs_fake_gpu
def test_every_graph_runs_to_its_end_on_the_provider_and_is_captured(tmp_path: Path) -> None:
    """Kernels refuse some shapes and types only when they run; here they do nothing but that."""
    names = ("base", "key_decay", "feature_map_elu", "one_key_value_head", "torchscale_2023", "jamie_stirling", "stack")
    configs = {name: ABLATIONS[name] for name in (*names, *OTHER_LAYERS)}
    configs |= {f"{k}-{v}": model(k, v) for k, v in HEADS} | {"wide": WIDE_KEYS}
    folders = []
    for name, ops, dtype in pairwise(configs, OPERATOR_SETS, ("float32", "bfloat16")):
        config, out = configs[name], tmp_path / f"{name}-{ops}-{dtype}"
        folders.append(export(config, random_source(config, 1), out, ops=ops, dtype=dtype, device="cuda"))
    for ops in OPERATOR_SETS:
        base = export(BASE, random_source(BASE, 1), tmp_path / ops, ops=ops, device="cuda")
        for kind, symmetric in itertools.product(("int8", "int4"), (True, False)):
            out = tmp_path / f"{kind}-{symmetric}-{ops}"
            folders.append(quantize(base, out, kind, block_size=32, symmetric=symmetric))
    found = FakeGpu().evaluate(RUN, *folders)
    assert found == dict.fromkeys(map(str, folders))


COPIED = """
import ctypes, json, sys
from pathlib import Path
import numpy as np
from retnet_tools.runtime import DecoderSession, Device
found = []
for folder in sys.argv[1:]:
    session = DecoderSession(Path(folder), Device("cuda"), cuda_graph=False)
    state = session.new_state(3)
    session.step(np.zeros(3, int), state)
    copied = ctypes.c_size_t.in_dll(ctypes.CDLL("libcudart.so.13"), "copied")
    copied.value = 0
    session.step(np.zeros(3, int), state)
    found.append(copied.value)
print(json.dumps(found))
"""


@needs_fake_gpu
def test_a_step_copies_states_only_where_keys_are_split(tmp_path: Path) -> None:
    """A Reshape to an output of the graph is a copy: what splitting keys costs beside the operator."""
    heads = [(64, 128), (256, 432), (160, 320), (256, 512)]
    folders = [
        export(model(k, v), random_source(model(k, v), 1), tmp_path / f"{k}-{v}", device="cuda") for k, v in heads
    ]
    state = 3 * 2 * 2 * 256 * 512 * 4
    *others, split = FakeGpu().evaluate(COPIED, *folders)
    assert max(others) < state // 100
    assert state <= split < 1.01 * state


@pytest.mark.parametrize("ops", OPERATOR_SETS)
def test_float16_states_keep_their_border_and_their_scale(ops: str, tmp_path: Path) -> None:
    config = model(256, 512)
    source, ids = random_source(config, 5), random_tokens(config, 1, 4, 6)
    found = {}
    for device in TARGET_DEVICES:
        out = export(config, source, tmp_path / device, ops=ops, state_dtype="float16", device=device)
        *_, (found[device], states) = run_steps(cpu_runner(out / STEP_FILE), ids, zero_states(config, 1, np.float16))
        assert {(state.shape, state.dtype) for state in states} == {((1, 2, 256, 512), np.dtype(np.float16))}
    np.testing.assert_allclose(found["cuda"], found["cpu"], rtol=0, atol=GRAPH_FLOAT32)


def test_states_pass_the_border_as_they_are(tmp_path: Path) -> None:
    out = export(model(256, 512), random_source(model(256, 512), 1), tmp_path / "out", device="cuda")
    graph = load_graph(out / STEP_FILE)
    states = [value for value in (*graph.inputs, *graph.outputs) if "recurrent_state" in (value.name or "")]
    assert {tuple(value.shape.dims[1:]) for value in states} == {(2, 256, 512)}
    assert {value.dtype for value in states} == {ir.DataType.FLOAT}


def test_the_manifest_says_the_device_and_an_export_is_written_again_for_it(tmp_path: Path) -> None:
    out = export(BASE, random_source(BASE, 1), tmp_path / "out", device="cuda")
    assert read_manifest(out).device == "cuda"
    assert plan_of_export(out).device == "cuda"


def test_a_manifest_without_a_device_is_for_the_cpu_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    out = export(BASE, random_source(BASE, 1), tmp_path / "out")
    file = out / "retnet.json"
    text = file.read_text()
    file.write_text(text.replace(' "device": "cpu",\n', ""))
    assert '"device"' not in file.read_text()
    assert read_manifest(out).device == "cpu"
    file.write_text(text.replace('"device": "cpu"', '"device": "tpu"'))
    with pytest.raises(InputError, match="device 'tpu'; expected one of cpu, cuda"):
        read_manifest(out)


def test_every_device_has_every_operator_set_and_others_are_refused() -> None:
    assert {name: tuple(device.operators) for name, device in TARGET_DEVICES.items()} == dict.fromkeys(
        DEVICES, OPERATORS
    )
    with pytest.raises(UsageError, match=r"--device 'cuda:1'; expected one of cpu, cuda.*did you mean 'cuda'"):
        target_device("cuda:1")
    with pytest.raises(UsageError, match=r"--ops 'fuse'.*did you mean 'fused'"):
        operator_set("fuse", "cuda")
