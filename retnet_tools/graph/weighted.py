"""A graph under construction whose weights lie in weights.data, whatever the network is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from retnet_tools.config import BlockNorm
from retnet_tools.graph.contract import TensorSpec
from retnet_tools.graph.nodes import GraphBuilder, tensor_type
from retnet_tools.graph.standard_ops import NormWeights, StandardOps
from retnet_tools.graph.weight_tensors import WeightTensor
from retnet_tools.weights import Array


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

    def linear(self, x: ir.Value, name: str, sources: tuple[str, ...], bias: bool) -> ir.Value:
        """y = x W^T + b; several sources are merged along their outputs."""
        inputs = [x, self._merged(f"{name}.weight", tuple(f"{s}.weight" for s in sources))]
        if bias:
            inputs.append(self._merged(f"{name}.bias", tuple(f"{s}.bias" for s in sources)))
        return self.g.op("Gemm", *inputs, transB=1)

    def norm_weights(self, name: str, norm: BlockNorm) -> NormWeights:
        """The parameters of a norm."""
        return NormWeights(norm, self.weight(f"{name}.weight"), self.weight(f"{name}.bias") if norm.bias else None)

    def weight(self, name: str) -> ir.Value:
        """One weight by its canonical name."""
        return self._merged(name, (name,))

    def table(self, name: str, table: Array) -> ir.Value:
        """A computed table."""
        return self._declare(WeightTensor(name, table.dtype.name, table.shape, table=table))

    def finish(
        self,
        name: str,
        inputs: list[ir.Value],
        outputs: list[ir.Value],
        specs: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]],
    ) -> BuiltGraph:
        """The graph, its outputs named as the second of its specs says."""
        for value, spec in zip(outputs, specs[1], strict=True):
            value.name, value.shape, value.type = spec.name, ir.Shape(spec.shape), tensor_type(spec.dtype)
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self.g.nodes,
            initializers=list(self.g.initializers.values()),
            opset_imports=dict(self.ops.opsets),
            name=name,
        )
        return BuiltGraph(graph, *specs, self.stored)

    def _merged(self, name: str, sources: tuple[str, ...]) -> ir.Value:
        rows = sum(self.shapes[source][0] for source in sources)
        return self._declare(WeightTensor(name, self.dtype, (rows, *self.shapes[sources[0]][1:]), sources))

    def _declare(self, tensor: WeightTensor) -> ir.Value:
        if tensor.name not in self.stored:
            self.stored[tensor.name] = tensor
            self.g.initializers[tensor.name] = ir.Value(
                name=tensor.name, shape=ir.Shape(tensor.shape), type=tensor_type(tensor.dtype)
            )
        return self.g.initializers[tensor.name]
