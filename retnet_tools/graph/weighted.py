"""A graph under construction whose weights lie in weights.data, whatever the network is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import Value

from retnet_tools.config import BlockNorm
from retnet_tools.graph.contract import TensorSpec
from retnet_tools.graph.nodes import GraphBuilder, tensor_type
from retnet_tools.graph.standard_ops import NormWeights, StandardOps
from retnet_tools.graph.weight_tensors import WeightTensor
from retnet_tools.weights import Array

Border = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]
"""The inputs and the outputs of a graph."""


@dataclass(frozen=True)
class BuiltGraph:
    """A graph, its border, and the tensors that it expects in weights.data."""

    graph: ir.Graph
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    stored: dict[str, WeightTensor]


class WeightedBuilder:
    """Nodes, and the stored tensors that they read.

    Args:
        shapes: of all weights, by canonical name.
        dtype: in which they are stored.
        ops: the operator set.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: str, ops: StandardOps) -> None:
        self.shapes, self.dtype, self.ops = shapes, dtype, ops
        self.g = GraphBuilder()
        self.stored: dict[str, WeightTensor] = {}

    def linear(self, x: Value, name: str, sources: tuple[str, ...], bias: bool) -> Value:
        """y = x W^T + b; several sources are merged along their outputs."""
        parts = ("weight", "bias") if bias else ("weight",)
        merged = (self._merged(f"{name}.{part}", tuple(f"{source}.{part}" for source in sources)) for part in parts)
        return self.g.op("Gemm", x, *merged, transB=1)

    def norm_weights(self, name: str, norm: BlockNorm) -> NormWeights:
        """The parameters of a norm."""
        return NormWeights(norm, self.weight(f"{name}.weight"), self.weight(f"{name}.bias") if norm.bias else None)

    def weight(self, name: str) -> Value:
        """One weight by its canonical name."""
        return self._merged(name, (name,))

    def table(self, name: str, table: Array) -> Value:
        """A computed table."""
        tensor = WeightTensor(name, table.dtype.name, table.shape, table=table)
        return tensor.declared(self.g.initializers, self.stored)

    def finish(self, name: str, inputs: list[Value], outputs: list[Value], border: Border) -> BuiltGraph:
        """The graph, its outputs named as its border says."""
        for value, spec in zip(outputs, border[1], strict=True):
            value.name, value.shape, value.type = spec.name, ir.Shape(spec.shape), tensor_type(spec.dtype)
        initializers, opsets = list(self.g.initializers.values()), dict(self.ops.opsets)
        graph = ir.Graph(
            inputs, outputs, nodes=self.g.nodes, initializers=initializers, opset_imports=opsets, name=name
        )
        return BuiltGraph(graph, *border, self.stored)

    def _merged(self, name: str, sources: tuple[str, ...]) -> Value:
        rows = sum(self.shapes[source][0] for source in sources)
        tensor = WeightTensor(name, self.dtype, (rows, *self.shapes[sources[0]][1:]), sources)
        return tensor.declared(self.g.initializers, self.stored)
