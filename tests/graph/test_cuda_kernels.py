"""The table of CUDA kernels: what it says of every graph, and that ONNX Runtime's own partitioner says the same."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from retnet_tools.graph.contract import STEP_FILE
from retnet_tools.graph.cuda_kernels import CpuNode, cpu_nodes, kernel_version
from retnet_tools.graph.export import kernel_notes, plan_export
from retnet_tools.graph.nodes import GraphBuilder, tensor_type
from retnet_tools.graph.ops import MICROSOFT, OPERATOR_SETS
from retnet_tools.quantize.options import QuantizeOptions
from retnet_tools.quantize.plan import plan_blocks
from tests.exports import checkpoint, export
from tests.fake_gpu import FakeGpu, needs_fake_gpu
from tests.helpers import ABLATIONS, BASE, OTHER_LAYERS, random_source
from tests.pairs import pairwise
from tests.quantized import quantize

DTYPES = ("float32", "float16", "bfloat16")
SHAPE_OPERATORS = {"Add", "Concat", "Div", "Equal", "Gather", "Min", "Mul", "Sub", "Unsqueeze"}

PLACEMENT = """
import json, sys
from dataclasses import replace
from pathlib import Path
from onnxruntime import InferenceSession, SessionOptions, set_default_logger_severity
from retnet_tools.graph.cuda_kernels import cpu_nodes
from retnet_tools.graph.folder import load_graph
from retnet_tools.runtime.onnx_session import RECORD_PLACEMENT, node_placement

set_default_logger_severity(4)
found = []
for path in map(Path, sys.argv[1:]):
    options = SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.add_session_config_entry(*RECORD_PLACEMENT)
    predicted = {node.name for node in cpu_nodes(load_graph(path))}
    try:
        session = InferenceSession(str(path), options, providers=["CUDAExecutionProvider"], enable_fallback=0)
    except Exception as error:
        found.append([str(path), "refused", sorted(node.operator for node in cpu_nodes(load_graph(path)))])
        continue
    nodes = node_placement(session).nodes
    placed = {name for own in nodes.values() for name in own}
    actual = set(nodes.get("CPUExecutionProvider", {}))
    found.append([str(path), sorted(predicted & placed), sorted(actual)])
print(json.dumps(found))
"""


def placements(*graphs: Path) -> list[tuple[str, list[str], list[str]]]:
    """For each graph its name and the nodes on the CPU, as predicted and as ONNX Runtime places them."""
    return [tuple(row) for row in FakeGpu().evaluate(PLACEMENT, *graphs)]


@pytest.mark.parametrize(("name", "dtype", "ops"), pairwise(ABLATIONS, DTYPES, OPERATOR_SETS))
def test_every_node_of_an_export_for_cuda_has_a_kernel_and_steps_leave_none_on_the_cpu(
    name: str, dtype: str, ops: str
) -> None:
    config = ABLATIONS[name]
    for target in ("onnx", "genai") if config.has_vocabulary else ("onnx",):
        opened = checkpoint(config, random_source(config, 1))
        plan = plan_export(opened, dtype=dtype, ops=ops, target=target, device="cuda")
        for file, built in plan.graphs.items():
            found = cpu_nodes(built.graph)
            assert not [node for node in found if node.reason == "no kernel"]
            assert {node.operator for node in found} <= (set() if file == STEP_FILE else SHAPE_OPERATORS)
        assert kernel_notes(plan) == ()


@pytest.mark.parametrize(
    ("name", "ops", "dtype", "bits", "symmetric"),
    pairwise(
        ("base", "tied", "projection_bias", "plain_ffn", *OTHER_LAYERS),
        OPERATOR_SETS,
        DTYPES,
        ("int8", "int4"),
        (False, True),
    ),
)
def test_quantized_weights_have_kernels_too(name: str, ops: str, dtype: str, bits: str, symmetric: bool) -> None:
    plan = plan_export(checkpoint(ABLATIONS[name], random_source(BASE, 1)), dtype=dtype, ops=ops, device="cuda")
    plan = plan_blocks(plan, QuantizeOptions(bits, block_size=32, symmetric=symmetric).scheme(ops))
    for file, built in plan.graphs.items():
        missing = {node.operator for node in cpu_nodes(built.graph) if node.reason == "no kernel"}
        # ONNX Runtime makes MatMulNBits of DequantizeLinear, which has no bfloat16.
        assert missing <= ({"DequantizeLinear"} if (ops, dtype) == ("standard", "bfloat16") else set())
        if file == STEP_FILE and not missing:
            assert cpu_nodes(built.graph) == []


def test_an_operator_newer_than_its_kernel_has_none() -> None:
    """Elu has a CUDA kernel of version 6 without end, and version 22 in opset 23: ONNX Runtime takes no chances."""
    config = ABLATIONS["feature_map_elu"]
    plan = plan_export(checkpoint(config, random_source(config, 1)), dtype="float32", ops="fused")
    found = {(node.operator, node.reason, node.types) for node in cpu_nodes(plan.graphs[STEP_FILE].graph)}
    assert found == {("Elu", "no kernel", ("float",))}


def test_what_has_no_kernel_is_noted_at_export() -> None:
    """A gate is made of operators as they are."""

    config = replace(BASE, gate="elu")
    plan = plan_export(checkpoint(config, random_source(config, 1)), dtype="float16", ops="fused", device="cuda")
    notes = kernel_notes(plan)
    assert len(notes) == len(plan.graphs)
    assert all(f"onnxruntime {kernel_version()} has no CUDA kernel for Elu of float16" in note for note in notes)


def graph_of(make, *inputs: tuple[str, str, tuple[int | str, ...]]) -> ir.Graph:
    """A graph from a builder function over named inputs."""
    g = GraphBuilder()
    values = [ir.Value(name=name, type=tensor_type(kind), shape=ir.Shape(shape)) for name, kind, shape in inputs]
    outputs = make(g, *values)
    initializers = list(g.initializers.values())
    return ir.Graph(values, list(outputs), nodes=g.nodes, initializers=initializers, opset_imports={"": 23})


def test_what_reads_a_shape_goes_to_the_cpu_until_a_kernel_takes_it_from_there() -> None:
    def make(g: GraphBuilder, x: ir.Value) -> list[ir.Value]:
        length = g.op("Gather", g.op("Shape", x), g.constant("one", np.array(1)), axis=0)
        zero = g.constant("zero", np.array(0))
        steps = g.op("Range", zero, length, g.constant("one", np.array(1)))
        return [g.op("Add", steps, steps), g.op("Mul", length, length)]

    found = cpu_nodes(graph_of(make, ("x", "float32", ("b", "t"))))
    assert [(node.operator, node.reason) for node in found] == [("Gather", "shapes"), ("Mul", "shapes")]


def test_half_types_are_never_moved_for_shapes() -> None:
    def make(g: GraphBuilder, x: ir.Value) -> list[ir.Value]:
        size = g.op("Shape", x)
        return [g.op("Cast", size, to=ir.DataType.FLOAT16), g.op("Mul", x, x)]

    found = cpu_nodes(graph_of(make, ("x", "float16", ("b", "t"))))
    assert [node.operator for node in found] == ["Cast"]


def test_an_unknown_operator_and_unknown_types_have_no_kernel() -> None:
    def make(g: GraphBuilder, x: ir.Value) -> list[ir.Value]:
        y = g.op("NoSuchOperator", x, domain=MICROSOFT)
        return [g.op("Add", y, y)]

    found = cpu_nodes(graph_of(make, ("x", "float32", (2,))))
    assert found[0] == CpuNode("/NoSuchOperator", "com.microsoft.NoSuchOperator", "no kernel", ("float",))
    assert (found[1].operator, found[1].types) == ("Add", ("unknown", "unknown"))


@needs_fake_gpu
@pytest.mark.slow
def test_the_prediction_is_what_the_provider_does_with_every_model(tmp_path: Path) -> None:
    graphs: dict[str, tuple[str, str]] = {}
    for i, row in enumerate(pairwise(ABLATIONS, OPERATOR_SETS, ("onnx", "genai"), DTYPES, ("cpu", "cuda"))):
        name, ops, target, dtype, device = row
        config = ABLATIONS[name]
        target, out = target if config.has_vocabulary else "onnx", tmp_path / f"{i}-{name}"
        export(config, random_source(config, 1), out, ops=ops, dtype=dtype, target=target, device=device)
        graphs |= {str(graph): (dtype, device) for graph in sorted(out.glob("*.onnx"))}
    for device, kind in itertools.product(("cpu", "cuda"), ("int8", "int4")):
        parent = export(BASE, random_source(BASE, 1), tmp_path / f"{device}-{kind}", ops="standard", device=device)
        quantized = quantize(parent, tmp_path / f"{device}-{kind}-quantized", kind, block_size=32)
        graphs |= {str(graph): ("float32", device) for graph in sorted(quantized.glob("*.onnx"))}
    for graph, predicted, actual in placements(*map(Path, graphs)):
        dtype, device = graphs[graph]
        if predicted == "refused":
            # The CPU provider has no bfloat16 to fall back to.
            assert (dtype, device) == ("bfloat16", "cpu")
            assert {"Elu", "LeakyRelu"} & set(actual), graph
        else:
            assert predicted == actual, graph
            assert device == "cpu" or not actual or STEP_FILE not in graph


def test_the_table_knows_the_signatures_that_onnxruntime_has() -> None:
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    import retnet_tools.graph

    file = Path(retnet_tools.graph.__path__[0]) / "data" / "cuda_kernels.json"
    signatures = json.loads(file.read_text())["signatures"]
    own = {f"{s.domain}.{s.name}": s for s in get_all_operator_schema() if s.domain == MICROSOFT}
    for name in ("LinearAttention", "MatMulNBits", "GatherBlockQuantized", "SkipSimplifiedLayerNormalization"):
        schema = own[f"{MICROSOFT}.{name}"]
        expected = [[port.typeStr for port in ports] for ports in (schema.inputs, schema.outputs)]
        assert signatures[f"{MICROSOFT}.{name}"] == expected
