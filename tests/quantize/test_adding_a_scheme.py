"""Weights of 2 bits: a row of `CODE_TYPES` with a packing function, and nothing else, takes them from the words of the
command line to a folder that ONNX Runtime and the reference evaluator run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from retnet_tools.formats.canonical import write_canonical
from retnet_tools.graph import code_types, contract
from retnet_tools.graph.code_types import BlockFormat, CodeType, matrix_bytes
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.paper import paper_config
from retnet_tools.quantize.blockwise import dequantize_rows, quantize_rows
from retnet_tools.quantize.contents import pack
from retnet_tools.quantize.options import QuantizeOptions, parse_type
from retnet_tools.weights import Array
from tests.exports import cpu_runner, export, run_steps, zero_states
from tests.helpers import ABLATIONS, BASE, random_source, random_tokens
from tests.pairs import pairwise
from tests.quantize.calibrated import FIXTURE
from tests.quantized import decoded_source, quantize
from tests.reference import reference_logits
from tests.tolerances import GRAPH_FLOAT32


def pack_quarters(codes: Array) -> Array:
    """Four codes in a byte, the low bits first."""
    fours = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // 4), 4), dtype=np.uint8)
    fours.reshape(*codes.shape[:-1], -1)[..., : codes.shape[-1]] = codes & 3
    return (fours << np.array([0, 2, 4, 6], dtype=np.uint8)).sum(-1, dtype=np.uint8)


# The integers of 2 bits that ONNX has since opset 25 are beyond the opset of the graphs: by columns a code has a byte.
INT2 = CodeType(
    name="int2",
    bits=2,
    aliases=("q2",),
    block_size=32,
    targets=(-2.4, -2.0, -1.6, 1.0, 1.4, 1.8),
    element="int8",
    pack=pack_quarters,
)


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(code_types.CODE_TYPES, INT2.name, INT2)


def test_its_words_and_defaults_are_known() -> None:
    assert parse_type("Q2") == "int2"
    scheme = QuantizeOptions("q2", tensor_types=("ffn=int4", "out_proj=q2")).scheme("fused")
    assert (scheme.type, scheme.block_size) == ("int2", 32)
    assert scheme.format_of("layers.0.retention.out_proj.weight") == BlockFormat(2, 32, True)
    assert scheme.format_of("layers.0.ffn.up_proj.weight") == BlockFormat(4, 32, True)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(5, 96), (7, 45)])
def test_a_matrix_is_quantized_packed_and_dequantized(shape: tuple[int, int], symmetric: bool) -> None:
    weight = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    format = BlockFormat(2, 32, symmetric)
    rows = quantize_rows(weight, format, np.dtype(np.float32))
    assert rows.codes.max() == 3
    codes, scales, zeros = pack(rows, format, "rows")
    assert matrix_bytes(shape, format, 4) == codes.nbytes + scales.nbytes + (0 if zeros is None else zeros.nbytes)

    def unpacked(packed: Array) -> Array:
        bits = np.unpackbits(packed.reshape(len(packed), -1), axis=1, bitorder="little").astype(np.float32)
        return bits[:, 0::2] + 2 * bits[:, 1::2]

    middle = 2.0 if zeros is None else np.repeat(unpacked(zeros)[:, : scales.shape[1]], 32, 1)
    expected = (unpacked(codes) - middle) * np.repeat(scales, 32, 1)
    np.testing.assert_array_equal(dequantize_rows(rows, format), expected[:, : shape[1]])
    # Four levels lose something, and far from all.
    assert 0.2 < np.sqrt(np.mean((expected[:, : shape[1]] - weight) ** 2)) / weight.std() < 0.5


@pytest.mark.parametrize(
    ("name", "ops", "symmetric"),
    pairwise(["base", "tied", "other_head_sizes"], ["fused", "standard"], [True, False]),
)
def test_onnxruntime_runs_it(name: str, ops: str, symmetric: bool, tmp_path: Path) -> None:
    config = ABLATIONS.get(name, BASE)
    folder = export(config, random_source(config, 3), tmp_path / "float", ops=ops)
    level = {"accuracy_level": 0} if ops == "fused" else {}
    out = quantize(folder, tmp_path / "out", "int2", symmetric=symmetric, **level)
    assert read_manifest(out).quantization.scheme.type == "int2"
    assert "int2 in blocks of 32" in (out / contract.CARD_FILE).read_text()
    ids, graph = random_tokens(config, 2, 5, 1), out / contract.STEP_FILE
    kinds = {node.op_type for node in onnx.load(graph, load_external_data=False).graph.node}
    assert ("MatMulNBits" if ops == "fused" else "DequantizeLinear") in kinds
    expected = reference_logits(config, decoded_source(config, graph), ids)
    runs = [cpu_runner(graph, exact=True)]
    if ops == "standard":
        evaluator = ReferenceEvaluator(str(graph))
        runs.append(lambda feeds: evaluator.run(None, feeds))
    for run in runs:
        for n, (logits, _) in enumerate(run_steps(run, ids, zero_states(config, 2))):
            np.testing.assert_allclose(logits, expected[:, n], rtol=0, atol=GRAPH_FLOAT32)


@pytest.mark.parametrize("arguments", [["--method", "gptq"], ["--target-bits", "4.2"]], ids=lambda words: words[0])
def test_methods_and_targets_take_it(arguments: list[str], tmp_path: Path, cli) -> None:
    config = paper_config(vocab_size=2048, hidden_size=64, value_dim=64, ffn_dim=64, num_layers=2, num_heads=2)
    write_canonical(tmp_path / "in", config, random_source(config, 1), extra_files=[FIXTURE / "tokenizer.json"])
    text = ["--calibration", FIXTURE / "calibration.txt", "--calibration-tokens", "512"]
    result = cli("export", tmp_path / "in", "-o", tmp_path / "out", "--quantize", "q2", *arguments, *text, "--json")
    assert result.exit_code == 0, result.err
    record = json.loads(result.out)["quantization"]
    assert record["scheme"]["type"] == "int2"
    if arguments[0] == "--target-bits":
        assert {entry["type"] for entry in record["mixed_precision"]["sensitivities"]} == {"int2", "int4", "int8"}
