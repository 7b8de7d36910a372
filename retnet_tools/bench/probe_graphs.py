"""Graphs that measure a device: one product with a stored weight, and one copy."""

from __future__ import annotations

from dataclasses import dataclass

from retnet_tools.graph.contract import TensorSpec
from retnet_tools.graph.nodes import graph_value
from retnet_tools.graph.ops import FusedOps
from retnet_tools.graph.weighted import BuiltGraph, WeightedBuilder

PRODUCT_FILE = "product.onnx"
COPY_FILE = "copy.onnx"
PRODUCT_WEIGHT = "product.weight"


@dataclass(frozen=True)
class ProductShape:
    """The weight `[rows, columns]` of a product, and the type of what it is multiplied with."""

    rows: int
    columns: int
    input_dtype: str

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The weight by name."""
        return {PRODUCT_WEIGHT: (self.rows, self.columns)}


def product_graph(shape: ProductShape) -> BuiltGraph:
    """y = x W^T for x `[M, columns]`."""
    builder = WeightedBuilder(shape.shapes, shape.input_dtype, FusedOps())
    specs = (
        (TensorSpec("x", shape.input_dtype, ("m", shape.columns)),),
        (TensorSpec("y", shape.input_dtype, ("m", shape.rows)),),
    )
    builder.g.scope = "product"
    x = graph_value(specs[0][0])
    y = builder.linear(x, "product", ("product",), bias=False)
    return builder.finish("product", [x], [y], specs)


def copy_graph() -> BuiltGraph:
    """y = -x, float32."""
    builder = WeightedBuilder({}, "float32", FusedOps())
    specs = ((TensorSpec("x", "float32", ("n",)),), (TensorSpec("y", "float32", ("n",)),))
    builder.g.scope = "copy"
    x = graph_value(specs[0][0])
    return builder.finish("copy", [x], [builder.g.op("Neg", x)], specs)
