"""Graphs with their matrices replaced by quantized ones: Gemm and Gather over stored weights, whatever built them."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.graph.nodes import GraphBuilder
from retnet_tools.graph.ops import StandardOps
from retnet_tools.graph.quantization import AccuracyLevel
from retnet_tools.graph.weight_tensors import BlockedMatrix, BuiltGraph, WeightTensor

_PART_ORDER = ("codes", "scales", "zero_points")
Formats = Mapping[str, BlockFormat | None]


def quantize_graph(
    built: BuiltGraph,
    ops: StandardOps,
    formats: Formats,
    shapes: Mapping[str, tuple[int, ...]],
    accuracy_level: AccuracyLevel | None,
) -> BuiltGraph:
    """A copy of a graph that reads quantized matrices.

    A merged matrix, whose sources lie one after another along its rows, stays one where they all have one format.
    Otherwise it is split into its sources, and their products are put together again.

    Args:
        ops: the operator set of the graph.
        formats: of every matrix by canonical name; None where it stays float.
        shapes: of every tensor by canonical name.
        accuracy_level: of MatMulNBits.
    """
    rewriting = _Rewriting(built, ops, formats, shapes, accuracy_level)
    weights = {name for name, tensor in built.stored.items() if any(formats.get(s) for s in tensor.sources)}
    nodes = list(rewriting.graph)
    # Linear layers first: a tied embedding is looked up in what the output head has stored.
    for node in nodes:
        if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1 and _input(node, 1).name in weights:
            rewriting.replace(node, rewriting.linear(node))
    for node in nodes:
        if node.op_type == "Gather" and _input(node, 0).name in weights:
            rewriting.replace(node, rewriting.lookup(node))
    return rewriting.finish(weights)


class _Rewriting:
    """A copy of a graph, the nodes that replace one of it, and what they read of weights.data."""

    def __init__(
        self,
        built: BuiltGraph,
        ops: StandardOps,
        formats: Formats,
        shapes: Mapping[str, tuple[int, ...]],
        accuracy_level: AccuracyLevel | None,
    ) -> None:
        self.built, self.graph = built, built.graph.clone()
        self._ops, self._formats, self._shapes, self._level = ops, formats, shapes, accuracy_level
        self._stored = dict(built.stored)
        self._g = GraphBuilder()
        # The constants of the graph are there already, under names that say what they hold.
        self._g.initializers.update(self.graph.initializers)
        self._there = set(self.graph.initializers)

    def linear(self, node: ir.Node) -> ir.Value:
        """y = x W^T + b by the products that its formats ask for; starts the nodes that replace a Gemm."""
        x, products = _input(node, 0), self._start(node, _input(node, 1))
        bias = _input(node, 2) if len(node.inputs) > 2 else None
        if len(products) == 1:
            return self._product(x, *products[0], bias)
        y = self._g.op("Concat", *(self._product(x, *product, None) for product in products), axis=-1)
        return y if bias is None else self._g.op("Add", y, bias)

    def lookup(self, node: ir.Node) -> ir.Value:
        """Rows of an embedding; starts the nodes that replace a Gather."""
        ((tensor, format),) = self._start(node, _input(node, 0))
        if format is None:
            raise ValueError(f"{tensor.name} is to stay float")
        return self._ops.gather_blocked(self._g, self._matrix(tensor, format), _input(node, 1))

    def replace(self, node: ir.Node, value: ir.Value) -> None:
        """Put the nodes made since `_start` in the place of one."""
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], self._g.nodes, node.outputs, [value])

    def finish(self, weights: set[str]) -> BuiltGraph:
        """The graph, without the float matrices that nothing reads any more."""
        for name in weights:
            if self.graph.initializers[name].uses():
                raise ValueError(f"{name} is read by a node that is neither Gemm nor Gather")
            del self.graph.initializers[name]
            del self._stored[name]
        for name, value in self._g.initializers.items():
            if name not in self._there:
                self.graph.initializers[name] = value
        return BuiltGraph(self.graph, self.built.inputs, self.built.outputs, _in_order(self._stored))

    def _start(self, node: ir.Node, weight: ir.Value) -> list[tuple[WeightTensor, BlockFormat | None]]:
        """The parts of a weight that have a format each."""
        self._g.nodes, self._g.scope = [], node.name or node.op_type
        tensor = self.built.stored[weight.name or ""]
        formats = [self._formats[source] for source in tensor.sources]
        if len(set(formats)) == 1:
            return [(tensor, formats[0])]
        parts = (WeightTensor(source, tensor.dtype, self._shapes[source], (source,)) for source in tensor.sources)
        return list(zip(parts, formats, strict=True))

    def _product(
        self, x: ir.Value, tensor: WeightTensor, format: BlockFormat | None, bias: ir.Value | None
    ) -> ir.Value:
        if format is not None:
            return self._ops.linear_blocked(self._g, x, self._matrix(tensor, format), bias)
        return self._g.op("Gemm", x, self._declare(tensor), *([] if bias is None else [bias]), transB=1)

    def _matrix(self, tensor: WeightTensor, format: BlockFormat) -> BlockedMatrix:
        rows, columns = tensor.shape
        return BlockedMatrix(
            tensor.name,
            tensor.sources,
            (rows, columns),
            format,
            tensor.dtype,
            self._level,
            shared=f"{tensor.name}.codes" in self._stored,
            declare=self._declare,
        )

    def _declare(self, tensor: WeightTensor) -> ir.Value:
        return tensor.declared(self._g.initializers, self._stored)


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise ValueError(f"{node.name} lacks input {index}")
    return value


def _in_order(stored: Mapping[str, WeightTensor]) -> dict[str, WeightTensor]:
    """The parts of each matrix one after another, where the first of them stood."""
    places: dict[tuple[str, ...], int] = {}
    keys = {}
    for i, (name, tensor) in enumerate(stored.items()):
        if tensor.part is None:
            keys[name] = (i, 0)
        else:
            keys[name] = (places.setdefault(tensor.sources, i), _PART_ORDER.index(tensor.part.name))
    return {name: stored[name] for name in sorted(stored, key=keys.__getitem__)}
