"""Packed matrices against the operators that read them: onnxruntime's own, and onnx's reference evaluator."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from retnet_tools.graph.code_types import BlockFormat, matrix_bytes
from retnet_tools.quantize.contents import pack
from tests.pairs import pairwise
from tests.quantize.test_blockwise import FLOAT32, decode, quantize_rows, weights
from tests.tolerances import FLOAT16_PRODUCT, FLOAT32_PRODUCT

SHAPES = [(48, 256), (7, 200), (6, 33), (5, 96), (1, 1)]
FORMATS = [
    BlockFormat(bits, size, symmetric) for bits in (8, 4) for size in (32, 64, 128) for symmetric in (True, False)
]
everything = pytest.mark.parametrize(("format", "shape"), list(itertools.product(FORMATS, SHAPES)), ids=str)
with_types_and_batches = pytest.mark.parametrize(
    ("format", "shape", "scale_type", "batch"), pairwise(FORMATS, SHAPES, [np.float32, np.float16], [1, 5]), ids=str
)


def model(nodes: list[Any], constants: dict[str, Any], x: np.ndarray, rank: int = 2) -> onnx.ModelProto:
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    inputs = [helper.make_tensor_value_info("x", kind, [None] * x.ndim)]
    outputs = [helper.make_tensor_value_info("y", constants["scales"].data_type, [None] * rank)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(constants.values()))
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    # Multiplication in float32, where the optimizer makes a MatMulNBits of DequantizeLinear and MatMul.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def tensors(packed: tuple) -> dict[str, onnx.TensorProto]:
    named = dict(zip(("codes", "scales", "zero_points"), packed, strict=True))
    return {name: numpy_helper.from_array(array, name) for name, array in named.items() if array is not None}


def typed(name: str, kind: int, shape: tuple[int, ...], data: np.ndarray) -> onnx.TensorProto:
    return onnx.TensorProto(name=name, data_type=kind, dims=shape, raw_data=data.tobytes())


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@with_types_and_batches
def test_matmul_nbits_reads_what_was_packed(format: BlockFormat, shape: tuple, scale_type: type, batch: int) -> None:
    rows = quantize_rows(weights(*shape), format, np.dtype(scale_type))
    constants = tensors(pack(rows, format, "rows"))
    (count, columns), x = shape, weights(batch, shape[1], seed=1).astype(scale_type)
    node = helper.make_node(
        "MatMulNBits",
        ["x", *constants],
        ["y"],
        domain="com.microsoft",
        N=count,
        K=columns,
        bits=format.bits,
        block_size=format.block_size,
        accuracy_level=0,
    )
    expected = x.astype(np.float64) @ decode(rows, format).T
    tolerance = FLOAT32_PRODUCT if scale_type is np.float32 else FLOAT16_PRODUCT
    assert relative_error(run(model([node], constants, x), x), expected) < tolerance


@everything
def test_gather_block_quantized_reads_the_same_bytes(format: BlockFormat, shape: tuple) -> None:
    rows = quantize_rows(weights(*shape), format, FLOAT32)
    codes, *rest = pack(rows, format, "rows")
    constants = tensors((codes.reshape(shape[0], -1), *rest))
    node = helper.make_node(
        "GatherBlockQuantized",
        ["codes", "x", *list(constants)[1:]],
        ["y"],
        domain="com.microsoft",
        bits=format.bits,
        block_size=format.block_size,
    )
    ids = np.random.default_rng(2).integers(0, shape[0], (2, 3))
    found = run(model([node], constants, ids, rank=3), ids)
    np.testing.assert_allclose(found[..., : shape[1]], decode(rows, format)[ids], rtol=1e-6)
    assert (found[..., shape[1] :] == 0).all()


@everything
def test_dequantize_linear_reads_columns(format: BlockFormat, shape: tuple) -> None:
    rows = quantize_rows(weights(*shape), format, FLOAT32)
    codes, scales, zeros = pack(rows, format, "columns")
    kind = getattr(onnx.TensorProto, f"{'' if format.symmetric else 'U'}INT{format.bits}")
    constants = {
        "codes": typed("codes", kind, shape[::-1], codes),
        "scales": numpy_helper.from_array(scales, "scales"),
    }
    if zeros is not None:
        constants["zero_points"] = typed("zero_points", kind, scales.shape, zeros)
    nodes = [
        helper.make_node("DequantizeLinear", list(constants), ["w"], axis=0, block_size=format.block_size),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    x = weights(3, shape[1], seed=1)
    expected = x.astype(np.float64) @ decode(rows, format).T
    graph = model(nodes, constants, x)
    assert relative_error(run(graph, x), expected) < FLOAT32_PRODUCT
    assert relative_error(ReferenceEvaluator(graph).run(None, {"x": x})[0], expected) < FLOAT32_PRODUCT


def activation_rounding(x: np.ndarray, weight: np.ndarray, size: int) -> np.ndarray:
    """The most that x W^T `[B, N]` changes where each block of x is rounded to whole parts of its largest / 127."""
    bound = np.zeros((len(x), len(weight)))
    for start in range(0, x.shape[1], size):
        part = slice(start, start + size)
        step = np.abs(x[:, part]).max(1) / 127
        bound += step[:, None] / 2 * np.abs(weight[:, part]).sum(1)
    return bound


@with_types_and_batches
def test_at_level_4_no_more_is_lost_than_rounded_activations_explain(
    format: BlockFormat, shape: tuple, scale_type: type, batch: int
) -> None:
    rows = quantize_rows(weights(*shape), format, np.dtype(scale_type))
    constants = tensors(pack(rows, format, "rows"))
    x = weights(batch, shape[1], seed=1).astype(scale_type)
    node = helper.make_node(
        "MatMulNBits",
        ["x", *constants],
        ["y"],
        domain="com.microsoft",
        N=shape[0],
        K=shape[1],
        bits=format.bits,
        block_size=format.block_size,
        accuracy_level=4,
    )
    double, weight = x.astype(np.float64), decode(rows, format)
    expected = double @ weight.T
    lost = np.abs(run(model([node], constants, x), x) - expected)
    tolerance = FLOAT32_PRODUCT if scale_type is np.float32 else FLOAT16_PRODUCT
    allowed = activation_rounding(double, weight, format.block_size) + tolerance * np.abs(expected).max()
    assert (lost <= allowed).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(5, 256), (3, 200), (1, 33)])
def test_bytes_of_a_matrix_are_those_that_are_packed(format: BlockFormat, shape: tuple[int, int]) -> None:
    parts = pack(quantize_rows(weights(*shape), format, FLOAT32), format, "rows")
    assert matrix_bytes(shape, format, 4) == sum(part.nbytes for part in parts if part is not None)
    assert matrix_bytes(shape, None, 2) == 2 * math.prod(shape)
