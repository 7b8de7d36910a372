"""Nodes, small constants and values of a graph under construction."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from retnet_tools.dtypes import convert_array
from retnet_tools.graph.contract import TensorSpec
from retnet_tools.weights import Array

ELEMENT_TYPES = {
    "float32": ir.DataType.FLOAT,
    **{
        name: ir.DataType[name.upper()]
        for name in ("float16", "bfloat16", "int64", "int32", "uint8", "int8", "uint4", "int4")
    },
}
Pair = tuple[Value, Value]
"""Two graph values: of retention its output and the state after it."""


def tensor_type(dtype: str) -> ir.TensorType:
    """The ONNX type of a tensor."""
    return ir.TensorType(ELEMENT_TYPES[dtype])


def graph_value(spec: TensorSpec) -> Value:
    """A graph input."""
    return Value(name=spec.name, shape=ir.Shape(spec.shape), type=tensor_type(spec.dtype))


def epsilon(eps: float) -> float:
    """A norm's epsilon as a graph can hold it: 0 becomes the smallest normal float32, so that a zero vector stays 0."""
    return max(eps, float(np.finfo(np.float32).tiny))


class GraphBuilder:
    """Collects nodes and small constants; each node is named after the scope it was made in.

    Args:
        parent: the builder of the graph around this one, whose constants and shared values a subgraph uses too.
    """

    def __init__(self, parent: GraphBuilder | None = None, scope: str = "") -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, Value] = {}
        self.scope = scope
        self._root: GraphBuilder = parent._root if parent else self
        self._names: dict[str, int] = {}
        self._shared: dict[str, Value] = {}

    def node(
        self, op_type: str, *inputs: Value | None, domain: str = "", outputs: int = 1, **attributes: Any
    ) -> list[Value]:
        """Append a node; returns its outputs."""
        name = f"{self.scope}/{op_type}"
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        name = f"{name}_{count}" if count else name
        node = ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = f"{name}:{i}" if outputs > 1 else f"{name}:out"
        self.nodes.append(node)
        return list(node.outputs)

    def op(self, op_type: str, *inputs: Value | None, domain: str = "", **attributes: Any) -> Value:
        """Append a node with one output."""
        return self.node(op_type, *inputs, domain=domain, **attributes)[0]

    def constant(self, name: str, array: Array) -> Value:
        """A small constant, stored in the outermost graph, once for each name."""
        initializers = self._root.initializers
        if name not in initializers:
            tensor = ir.tensor(array, name=name)
            initializers[name] = Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return initializers[name]

    def int64(self, name: str, value: int) -> Value:
        """A scalar constant."""
        return self.constant(name, np.array(value, dtype=np.int64))

    def float32(self, name: str, value: float) -> Value:
        """A scalar constant."""
        return self.constant(name, np.array(value, dtype=np.float32))

    def integers(self, *values: int) -> Value:
        """A vector of int64, for shapes and axes."""
        return self.constant("ints_" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def reshape(self, x: Value, *shape: int) -> Value:
        """Reshape to a constant shape, with 0 (keep) and -1 (infer)."""
        return self.op("Reshape", x, self.integers(*shape))

    def cast(self, x: Value, source: str, target: str) -> Value:
        """Cast, or the value itself where the types agree already."""
        return x if source == target else self.op("Cast", x, to=ELEMENT_TYPES[target])

    def scale(self, x: Value, factor: float, dtype: str) -> Value:
        """x times a constant, in the type of x.

        Raises:
            InputError: a factor that the type cannot hold.
        """
        if factor == 1.0:
            return x
        array = convert_array(f"scale {factor:g}", np.array([factor]), ELEMENT_TYPES[dtype].numpy()).reshape(())
        return self.op("Mul", x, self.constant(f"scale_{factor!r}_{dtype}", array))

    def once(self, key: str, make: Callable[[GraphBuilder], Value]) -> Value:
        """A value that the whole graph shares: made on first use, in the outermost graph."""
        root = self._root
        if key not in root._shared:
            root._shared[key] = make(root)
        return root._shared[key]

    def subgraph(
        self,
        name: str,
        count: int,
        make: Callable[[GraphBuilder, list[Value]], tuple[Value, ...]],
        integers: Container[int] = (),
    ) -> ir.Graph:
        """A graph inside a node: `count` float32 inputs, and float32 outputs, but int64 at these places."""
        body = GraphBuilder(self, f"{self.scope}/{name}")
        inputs = [Value(name=f"{body.scope}/in_{i}", type=tensor_type("float32")) for i in range(count)]
        outputs = []
        for i, value in enumerate(make(body, inputs)):
            # A graph gives back what its own nodes made.
            own = value if value.producer() in body.nodes else body.op("Identity", value)
            own.type = tensor_type("int64" if i in integers else "float32")
            outputs.append(own)
        return ir.Graph(inputs, outputs, nodes=body.nodes, name=body.scope)

    def branch(
        self,
        condition: Value,
        then: Callable[[GraphBuilder], tuple[Value, ...]],
        otherwise: Callable[[GraphBuilder], tuple[Value, ...]],
        integers: Container[int] = (),
    ) -> list[Value]:
        """If: the values of one of two subgraphs, float32 but int64 at these places."""
        first = self.subgraph("then", 0, lambda body, _: then(body), integers)
        second = self.subgraph("else", 0, lambda body, _: otherwise(body), integers)
        return self.node("If", condition, outputs=len(first.outputs), then_branch=first, else_branch=second)


def scan(
    g: GraphBuilder,
    step: Callable[[GraphBuilder, Value, list[Value]], tuple[Value, Value]],
    state: Value,
    sequences: list[Value],
) -> Pair:
    """A Scan along the first axis of float32 sequences: the last state, and the outputs `[T, ...]`.

    Args:
        step: maps a state and one slice of each sequence to the next state and an output.
        state: before the first slice.
        sequences: `[T, ...]` each.
    """
    body = g.subgraph("body", len(sequences) + 1, lambda b, inputs: step(b, inputs[0], inputs[1:]))
    final, stacked = g.node("Scan", state, *sequences, outputs=2, body=body, num_scan_inputs=len(sequences))
    return final, stacked
