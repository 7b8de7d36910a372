"""The bytes that a token must move are those of the tensors in the file, and products are those of the graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from retnet_tools.bench.models import Precision, write_transformer
from retnet_tools.bench.traffic import bytes_read_whole, retnet_traffic, transformer_traffic
from retnet_tools.bench.transformer_graph import TRANSFORMER_FILE, matching_transformer
from retnet_tools.config import RetNetConfig
from retnet_tools.graph.contract import PREFILL_FILE, STEP_FILE
from retnet_tools.graph.export import plan_export
from retnet_tools.graph.quantization import Scheme
from retnet_tools.paper import MODEL_SIZES
from retnet_tools.quantize.plan import plan_blocks
from retnet_tools.quantize.steps import write_quantized
from tests.exports import checkpoint
from tests.helpers import ABLATIONS, BASE, random_source
from tests.pairs import pairwise

SCHEMES = {
    "float": None,
    "int8": Scheme("int8", 128),
    "int4": Scheme("int4", 32),
    "asymmetric": Scheme("int4", 64, symmetric=False),
    "mixed": Scheme("int4", 32, exclude=("lm_head",)),
}
MEDIUM = replace(MODEL_SIZES["medium"].config(2003), num_layers=2)


def written(config: RetNetConfig, folder: Path, scheme: Scheme | None, dtype: str, ops: str) -> Path:
    plan = plan_export(checkpoint(config, random_source(config, 1)), dtype=dtype, ops=ops)
    plan = plan if scheme is None else plan_blocks(plan, scheme)
    write_quantized(plan, folder, force=False)
    return folder


@pytest.mark.parametrize(("scheme", "dtype", "ops"), pairwise(SCHEMES, ["float32", "float16"], ["fused", "standard"]))
def test_weights_of_a_step_are_those_of_the_file_within_two_per_cent(
    scheme: str, dtype: str, ops: str, tmp_path: Path
) -> None:
    folder = written(MEDIUM, tmp_path / "out", SCHEMES[scheme], dtype, ops)
    model = retnet_traffic(MEDIUM, dtype, SCHEMES[scheme], "float32", 128).weight_bytes
    assert bytes_read_whole(folder) == pytest.approx(model, rel=0.02)
    # By onnx itself: the bytes of the stored tensors that no Gather reads.
    graph = onnx.load(folder / STEP_FILE, load_external_data=False).graph
    looked_up = {name for node in graph.node if "Gather" in node.op_type for name in node.input}
    lengths = [
        int(next(entry.value for entry in tensor.external_data if entry.key == "length"))
        for tensor in graph.initializer
        if tensor.external_data and tensor.name not in looked_up
    ]
    assert sum(lengths) == pytest.approx(model, rel=0.02)


@pytest.mark.parametrize("name", [name for name, config in ABLATIONS.items() if config.has_vocabulary])
def test_every_configuration_is_counted(name: str, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    folder = written(config, tmp_path / "out", None, "float32", "fused")
    assert bytes_read_whole(folder) == retnet_traffic(config, "float32", None, "float32", 128).weight_bytes


@pytest.mark.parametrize("scheme", ["float", "int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_transformer_is_counted_too(scheme: str, tied: bool, tmp_path: Path) -> None:
    config = matching_transformer(replace(MEDIUM, tie_word_embeddings=tied), max_positions=64)
    folder = write_transformer(config, Precision("float32", SCHEMES[scheme], "fused"), tmp_path / "out")
    model = transformer_traffic(config, "float32", SCHEMES[scheme]).weight_bytes
    assert bytes_read_whole(folder, TRANSFORMER_FILE) == pytest.approx(model, rel=0.02)


def test_a_step_reads_weights_once_and_reads_and_writes_states() -> None:
    traffic = retnet_traffic(BASE, "float32", None, "float32", 128)
    states = 2 * 4 * 8 * 12 * 4
    assert traffic.state_bytes(1) == traffic.state_bytes(10**6) == states
    assert traffic.decode_bytes(1, 500) == traffic.weight_bytes + 2 * states + 61 * 4
    assert traffic.decode_bytes(8, 500) == traffic.weight_bytes / 8 + 2 * states + 61 * 4


def test_a_transformer_reads_its_cache_and_writes_a_token() -> None:
    config = matching_transformer(MEDIUM, kv_groups=4, max_positions=64)
    traffic = transformer_traffic(config, "float16", None)
    token = 2 * 2 * config.num_kv_heads * config.head_size * 2
    assert traffic.state_bytes(1000) == 1000 * token
    assert traffic.decode_bytes(1, 1000) == traffic.weight_bytes + 1001 * token + 2003 * 4


def test_a_prompt_reads_weights_once_a_chunk() -> None:
    traffic = retnet_traffic(BASE, "float32", None, "float32", 128)
    one = traffic.prefill_bytes(1, 128, 0)
    assert traffic.prefill_bytes(1, 512, 0) == pytest.approx(one - 61 * 4 / 128 + 61 * 4 / 512)


def test_products_of_a_prompt_are_those_of_the_graph() -> None:
    """Counted on the graph's own matrix products, whose shapes onnx infers for a chunk of 128 tokens."""
    graph = plan_export(checkpoint(MEDIUM, random_source(MEDIUM, 1)), dtype="float32", ops="fused").graphs[PREFILL_FILE]
    tokens, flops = 128, 0.0
    heads, k, v = MEDIUM.num_heads, MEDIUM.head_k_dim, MEDIUM.head_v_dim
    for node in graph.graph:
        if node.op_type == "Gemm":
            rows, columns = graph.stored[node.inputs[1].name].shape
            once = "lm_head" in node.name or f"layers.{MEDIUM.num_layers - 1}/ffn" in node.name
            flops += 2 * rows * columns * (1 if once else tokens)
        if node.op_type == "MatMul":
            # Scores, what they weigh, what the state is read with, its update: Eq. 7.
            flops += heads * 2 * tokens * (tokens * (k + v) + 2 * k * v) / 4
    traffic = retnet_traffic(MEDIUM, "float32", None, "float32", tokens)
    head = 2 * (2003 * 1024 + 3 * 1024 * 1728)
    assert sum(node.op_type == "MatMul" for node in graph.graph) == 4 * MEDIUM.num_layers
    np.testing.assert_allclose(traffic.prefill_flops(tokens, 0) * tokens, flops - head, rtol=1e-9)


def test_a_token_meets_those_of_its_own_chunk() -> None:
    """Counted chunk by chunk: a prompt shorter than a chunk has no more scores than it has tokens."""
    heads, k, v, layers = BASE.num_heads, BASE.head_k_dim, BASE.head_v_dim, BASE.num_layers
    traffic = retnet_traffic(BASE, "float32", None, "float32", 128)
    for chunks in ([5], [128], [128, 128], [128, 128, 44]):
        tokens = sum(chunks)
        mixing = layers * heads * sum(c * (2 * c * (k + v) + 4 * k * v) for c in chunks)
        assert traffic.prefill_flops(tokens, 0) * tokens == pytest.approx(traffic.linear_flops * tokens + mixing)
