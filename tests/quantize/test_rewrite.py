"""Quantized graphs against a numpy RetNet on the weights that their files hold."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from retnet_tools.graph import contract
from retnet_tools.graph.ops import OPERATOR_SETS
from tests.exports import cpu_runner, export, run_genai, run_prefill, run_steps, zero_states
from tests.helpers import ABLATIONS, BASE, OTHER_LAYERS, random_source, random_tokens
from tests.pairs import pairwise
from tests.quantized import decoded_source, quantize
from tests.reference import reference_logits
from tests.tolerances import GRAPH_FLOAT16, GRAPH_FLOAT32

OPS = list(OPERATOR_SETS)
CONFIGS = ["base", "tied", "torchscale_2023", "stack", "head_bias", "no_gate", "plain_ffn", "other_head_sizes"]
CONFIGS += OTHER_LAYERS
KINDS, SYMMETRIC = ("int8", "int4"), (True, False)


def exact(ops: str) -> dict[str, int]:
    """Products in float32."""
    return {"accuracy_level": 0} if ops == "fused" else {}


def operators(folder: Path, name: str = contract.STEP_FILE) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(folder / name, load_external_data=False).graph.node)


def check_graphs(config, folder: Path, seed: int = 0) -> None:
    """step.onnx and prefill.onnx against the recurrence in float64."""
    ids = random_tokens(config, 2, 5, seed)
    for name in (contract.STEP_FILE, contract.PREFILL_FILE):
        run = cpu_runner(folder / name, exact=True)
        expected = reference_logits(config, decoded_source(config, folder / name), ids)
        if name == contract.STEP_FILE:
            for n, (logits, _) in enumerate(run_steps(run, ids, zero_states(config, 2))):
                np.testing.assert_allclose(logits, expected[:, n], rtol=0, atol=GRAPH_FLOAT32)
        else:
            logits, _ = run_prefill(run, ids, zero_states(config, 2))
            np.testing.assert_allclose(logits, expected[:, -1], rtol=0, atol=GRAPH_FLOAT32)


@pytest.mark.parametrize(("kind", "size", "symmetric", "ops"), pairwise(KINDS, (32, 64, 128), SYMMETRIC, OPS))
def test_every_scheme_computes_with_the_weights_it_stores(kind, size, symmetric, ops: str, tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 3), tmp_path / "float", ops=ops)
    options = {"block_size": size, "symmetric": symmetric, **exact(ops)}
    check_graphs(BASE, quantize(folder, tmp_path / "out", kind, **options))


@pytest.mark.parametrize(("name", "ops", "kind", "symmetric"), pairwise(CONFIGS[1:], OPS, KINDS, SYMMETRIC))
def test_every_kind_of_model_computes_with_the_weights_it_stores(
    name: str, ops: str, kind, symmetric: bool, tmp_path: Path
) -> None:
    config = ABLATIONS[name]
    folder = export(config, random_source(config, 4), tmp_path / "float", ops=ops)
    options = {"block_size": 32, "symmetric": symmetric, **exact(ops)}
    check_graphs(config, quantize(folder, tmp_path / "out", kind, **options))


@pytest.mark.parametrize(
    ("name", "kind", "symmetric"), pairwise(["base", "tied", "other_head_sizes", *OTHER_LAYERS], KINDS, SYMMETRIC)
)
def test_the_reference_evaluator_runs_standard_graphs(name: str, kind, symmetric: bool, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    folder = export(config, random_source(config, 5), tmp_path / "float", ops="standard")
    graph = quantize(folder, tmp_path / "out", kind, symmetric=symmetric) / contract.STEP_FILE
    evaluator, ids = ReferenceEvaluator(str(graph)), random_tokens(config, 1, 3, 6)
    expected = reference_logits(config, decoded_source(config, graph), ids)
    for n, (logits, _) in enumerate(run_steps(lambda feeds: evaluator.run(None, feeds), ids, zero_states(config, 1))):
        np.testing.assert_allclose(logits, expected[:, n], rtol=0, atol=GRAPH_FLOAT32)


@pytest.mark.parametrize("name", ["base", "tied", "key_decay", *OTHER_LAYERS])
@pytest.mark.parametrize("ops", OPS)
def test_a_genai_graph_is_quantized_too(name: str, ops: str, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    folder = export(config, random_source(config, 7), tmp_path / "float", ops=ops, target="genai")
    out = quantize(folder, tmp_path / "out", "int4", **exact(ops))
    assert (out / contract.GENAI_CONFIG_FILE).read_bytes() == (folder / contract.GENAI_CONFIG_FILE).read_bytes()
    ids = random_tokens(config, 2, 9, 8)
    expected = reference_logits(config, decoded_source(config, out / contract.GENAI_FILE), ids)
    run = cpu_runner(out / contract.GENAI_FILE, exact=True)
    logits, states = run_genai(run, config, ids[:, :7], zero_states(config, 2))
    np.testing.assert_allclose(logits, expected[:, 6], rtol=0, atol=GRAPH_FLOAT32)
    logits, _ = run_genai(run, config, ids[:, 7:8], states, position=7)
    np.testing.assert_allclose(logits, expected[:, 7], rtol=0, atol=GRAPH_FLOAT32)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", ["base", "torchscale_2023"])
def test_a_merged_matrix_of_several_types_is_split(name: str, ops: str, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    folder = export(config, random_source(config, 9), tmp_path / "float", ops=ops)
    out = quantize(
        folder,
        tmp_path / "out",
        "int4",
        exclude=(r"layers\.0\.retention\.k_proj", r"layers\.1\.ffn"),
        tensor_types=(r"v_proj=int8",),
        **exact(ops),
    )
    check_graphs(config, out)
    decoded = decoded_source(config, out / contract.STEP_FILE).tensors
    source = random_source(config, 9).tensors
    error = {name: np.abs(decoded[name] - source[name]).max() for name in source}
    retention = "layers.0.retention"
    assert error[f"{retention}.k_proj.weight"] == error["layers.1.ffn.up_proj.weight"] == 0
    assert 0 < error[f"{retention}.v_proj.weight"] < 0.1 * error[f"{retention}.q_proj.weight"]


def test_a_rule_for_a_whole_merged_matrix_leaves_it_merged(tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 10), tmp_path / "float")
    out = quantize(folder, tmp_path / "out", "int4", tensor_types=(r"layers\.0\.=int8",))
    assert operators(out)["MatMulNBits"] == 4 * BASE.num_layers + 1
    assert "Concat" not in operators(out)
    out = quantize(folder, tmp_path / "split", "int4", tensor_types=(r"layers\.0\.retention\.q_proj=int8",))
    assert operators(out)["MatMulNBits"] == 4 * BASE.num_layers + 1 + 3
    assert operators(out)["Concat"] == 1


@pytest.mark.parametrize("level", [0, 1, 4])
def test_products_are_as_accurate_as_was_asked_for(level: int, tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 10), tmp_path / "float")
    out = quantize(folder, tmp_path / "out", "int4", accuracy_level=level)
    for graph in (contract.STEP_FILE, contract.PREFILL_FILE):
        nodes = onnx.load(out / graph, load_external_data=False).graph.node
        products = [node for node in nodes if node.op_type == "MatMulNBits"]
        found = [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in products]
        assert {attributes["accuracy_level"] for attributes in found} == {level}


@pytest.mark.parametrize("name", ["base", "tied", "torchscale_2023", *OTHER_LAYERS])
def test_fused_graphs_have_one_node_for_each_product(name: str, tmp_path: Path) -> None:
    folder = export(ABLATIONS[name], random_source(ABLATIONS[name], 10), tmp_path / "float")
    before, after = operators(folder), operators(quantize(folder, tmp_path / "out", "int4"))
    assert after["MatMulNBits"] == before["Gemm"]
    assert after["GatherBlockQuantized"] == 1
    assert "Gemm" not in after


@pytest.mark.parametrize("name", ["base", "tied", "torchscale_2023", *OTHER_LAYERS])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_standard_graphs_use_the_onnx_domain_and_become_matmul_nbits(name: str, kind, tmp_path: Path) -> None:
    folder = export(ABLATIONS[name], random_source(ABLATIONS[name], 10), tmp_path / "float", ops="standard")
    out = quantize(folder, tmp_path / "out", kind)
    model = onnx.load(out / contract.STEP_FILE, load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert [opset.domain for opset in model.opset_import] == [""]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(out / contract.STEP_FILE), options, providers=["CPUExecutionProvider"])
    optimized = operators(tmp_path, "optimized.onnx")
    assert optimized["MatMulNBits"] == operators(folder)["Gemm"]
    assert optimized["DequantizeLinear"] == 1  # the embedding's


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_float16_activations_run_on_the_cpu(kind, ops: str, tmp_path: Path) -> None:
    source = random_source(BASE, 11, dtype=np.float16)
    folder = export(BASE, source, tmp_path / "float", ops=ops, dtype="float16")
    out = quantize(folder, tmp_path / "out", kind, **exact(ops))
    ids = random_tokens(BASE, 2, 5, 12)
    expected = reference_logits(BASE, decoded_source(BASE, out / contract.STEP_FILE), ids)
    run = cpu_runner(out / contract.STEP_FILE, exact=True)
    for n, (logits, after) in enumerate(run_steps(run, ids, zero_states(BASE, 2))):
        np.testing.assert_allclose(logits, expected[:, n], rtol=0, atol=GRAPH_FLOAT16)
    assert all(state.dtype == np.float32 for state in after)


@pytest.mark.parametrize(
    ("name", "kind", "dtype", "ops"), pairwise(["base", "tied"], KINDS, ["float32", "float16", "bfloat16"], OPS)
)
def test_the_checker_accepts_every_graph(name: str, kind, dtype: str, ops: str, tmp_path: Path) -> None:
    folder = export(ABLATIONS[name], random_source(ABLATIONS[name], 1), tmp_path / "float", ops=ops, dtype=dtype)
    out = quantize(folder, tmp_path / "out", kind, symmetric=False)
    for graph in (contract.STEP_FILE, contract.PREFILL_FILE):
        onnx.checker.check_model(str(out / graph), full_check=True)
