"""Which nodes of a graph ONNX Runtime would run on CUDA, told from the graph and a table of the provider's kernels.

`data/cuda_kernels.json` lists the kernels that the CUDA provider of one onnxruntime registers, and the types that they
take (`benchmarks/cuda_kernels.py` makes it). A node goes to the CPU for one of two reasons:

- there is no kernel for its operator and types;
- it computes shapes. ONNX Runtime moves a node there when all it reads are small constants, inputs of the graph and
  values that lie in the CPU's memory already, at least one of these (onnxruntime/core/framework/
  fallback_cpu_capability.cc, GetCpuPreferredNodes). Shape and Size give such values, and so do the nodes moved there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import onnx.defs
import onnx_ir as ir

Reason = Literal["no kernel", "shapes"]

_HOST_OUTPUTS = {"Shape", "Size"}
"""Operators whose CUDA kernels write to the CPU's memory."""
_HOST_INPUTS: Mapping[str, frozenset[int]] = {
    "ConstantOfShape": frozenset((0,)),
    "Expand": frozenset((1,)),
    "If": frozenset((0,)),
    "Loop": frozenset((0, 1)),
    "Pad": frozenset((1, 2, 3)),
    "Range": frozenset((0, 1, 2)),
    "ReduceSum": frozenset((1,)),
    "Reshape": frozenset((1,)),
    "Slice": frozenset((1, 2, 3, 4)),
    "Split": frozenset((1,)),
    "Squeeze": frozenset((1,)),
    "Tile": frozenset((1,)),
    "Trilu": frozenset((1,)),
    "Unsqueeze": frozenset((1,)),
}
"""Inputs that CUDA kernels read from the CPU's memory."""
_SMALL = 100
"""Elements of a constant that may move a node to the CPU, at most."""
_HALVES = ("float16", "bfloat16")
"""Types whose nodes are not moved."""
_NAMES = {ir.DataType.FLOAT: "float", ir.DataType.DOUBLE: "double"}


@dataclass(frozen=True)
class CpuNode:
    """A node that would not run on CUDA.

    Attributes:
        operator: `com.microsoft.QuickGelu` outside ai.onnx.
        types: of its inputs, for a node without a kernel.
    """

    name: str
    operator: str
    reason: Reason
    types: tuple[str, ...] = ()


def cpu_nodes(graph: ir.Graph) -> list[CpuNode]:
    """The nodes of a graph, those of its subgraphs included, that would run on the CPU beside the CUDA provider."""
    return list(_cpu_nodes(graph, {}))


def kernel_version() -> str:
    """The onnxruntime whose kernels the table lists."""
    return str(_table()["onnxruntime"])


def _cpu_nodes(graph: ir.Graph, outer: Mapping[ir.Value, str]) -> Iterator[CpuNode]:
    """Of one graph, from the types of the values around it."""
    types = dict(outer)
    for value in (*graph.inputs, *graph.initializers.values()):
        if value.dtype is not None:
            types[value] = _name(value.dtype)
    host: set[ir.Value] = set()
    for node in graph:
        for inner in _subgraphs(node):
            yield from _cpu_nodes(inner, types)
        types.update(_output_types(node, types))
        reason: Reason | None = None if _has_kernel(node, types) else "no kernel"
        if reason is None and _moves(node, types, host, graph):
            reason = "shapes"
        if reason is not None:
            inputs = tuple(types.get(value, "unknown") for value in node.inputs if value is not None)
            yield CpuNode(node.name or "", _operator(node), reason, inputs if reason == "no kernel" else ())
        # A node without a kernel counts only where it reads such a value: ONNX Runtime follows no others.
        reached = any(value in host for value in node.inputs)
        if node.op_type in _HOST_OUTPUTS or reason == "shapes" or (reason == "no kernel" and reached):
            host.update(node.outputs)


def _moves(node: ir.Node, types: Mapping[ir.Value, str], host: set[ir.Value], graph: ir.Graph) -> bool:
    """Whether a node with a kernel is moved to the CPU."""
    inputs = [(i, value) for i, value in enumerate(node.inputs) if value is not None]
    if not any(value in host for _, value in inputs) or any(types.get(value) in _HALVES for _, value in inputs):
        return False
    by_kernel = _HOST_INPUTS.get(node.op_type, frozenset())
    return all(
        _small_constant(value) or value in graph.inputs or (value in host and i not in by_kernel) for i, value in inputs
    )


def _small_constant(value: ir.Value) -> bool:
    shape = value.shape
    return value.is_initializer() and shape is not None and math.prod(shape.numpy()) <= _SMALL


def _has_kernel(node: ir.Node, types: Mapping[ir.Value, str]) -> bool:
    """Whether a kernel takes the types of all inputs and outputs; an unknown type fits none."""
    formal_inputs, formal_outputs = _signature(node)
    ports: list[tuple[str, ir.Value | None]] = [
        *zip(_stretched(formal_inputs, len(node.inputs)), node.inputs, strict=True),
        *zip(_stretched(formal_outputs, len(node.outputs)), node.outputs, strict=True),
    ]
    found = [(constraint, types.get(value, "")) for constraint, value in ports if value is not None and value.name]
    return any(
        all(kind in kernel[constraint] for constraint, kind in found if constraint in kernel)
        for kernel in _table()["kernels"].get(_operator(node), ())
    )


def _output_types(node: ir.Node, types: Mapping[ir.Value, str]) -> Iterator[tuple[ir.Value, str]]:
    """The types of a node's outputs, where they follow from those of its inputs."""
    if node.op_type == "Cast":
        yield node.outputs[0], _name(ir.DataType(node.attributes["to"].as_int()))
        return
    bodies = list(_subgraphs(node))
    if bodies:
        # Subgraphs say the types of their outputs.
        for output, inner in zip(node.outputs, bodies[0].outputs, strict=True):
            if inner.dtype is not None:
                yield output, _name(inner.dtype)
        return
    formal_inputs, formal_outputs = _signature(node)
    known = _single_types(node)
    for constraint, value in zip(_stretched(formal_inputs, len(node.inputs)), node.inputs, strict=True):
        if constraint and value is not None and value in types:
            known.setdefault(constraint, types[value])
    if node.op_type == "DequantizeLinear":
        known["T3"] = known.get("T2", "")
    for constraint, output in zip(_stretched(formal_outputs, len(node.outputs)), node.outputs, strict=True):
        if kind := known.get(constraint, ""):
            yield output, kind


def _single_types(node: ir.Node) -> dict[str, str]:
    """Type constraints of ai.onnx that leave one type: bool of a comparison, int64 of Shape."""
    if node.domain:
        return {}
    schema = _schema(node)
    constraints = ((c.type_param_str, list(c.allowed_type_strs)) for c in schema.type_constraints)
    return {name: _short(allowed[0]) for name, allowed in constraints if len(allowed) == 1}


def _schema(node: ir.Node) -> onnx.defs.OpSchema:
    """An operator of ai.onnx in the table's opset, or in the newest where it came later and no kernel is known."""
    name, opset = node.op_type, _table()["opset"]
    return onnx.defs.get_schema(name, opset if onnx.defs.has(name, opset) else onnx.defs.onnx_opset_version())


def _signature(node: ir.Node) -> tuple[list[str], list[str]]:
    """The type constraints of an operator's inputs and outputs."""
    if node.domain:
        inputs, outputs = _table()["signatures"].get(_operator(node), ([], []))
        return list(inputs), list(outputs)
    schema = _schema(node)
    return [port.type_str for port in schema.inputs], [port.type_str for port in schema.outputs]


def _stretched(formal: list[str], count: int) -> list[str]:
    """One constraint for each actual input: the last formal one repeats where an operator takes any number."""
    return (formal + formal[-1:] * count)[:count] if formal else [""] * count


def _subgraphs(node: ir.Node) -> Iterable[ir.Graph]:
    return (attribute.as_graph() for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH)


def _operator(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _name(dtype: ir.DataType) -> str:
    return _NAMES.get(dtype, dtype.name.lower())


def _short(text: str) -> str:
    return text.removeprefix("tensor(").rstrip(")")


@cache
def _table() -> dict[str, Any]:
    file = resources.files("retnet_tools.graph") / "data" / "cuda_kernels.json"
    table: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return table
