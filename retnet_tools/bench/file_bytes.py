"""What a graph reads of weights.data, by its file."""

from __future__ import annotations

import math
from pathlib import Path

import onnx_ir as ir

from retnet_tools.graph.contract import STEP_FILE
from retnet_tools.graph.ops import LOOKUPS
from retnet_tools.graph.reader import load_graph


def bytes_read_whole(folder: Path, graph: str = STEP_FILE) -> int:
    """Bytes of the stored tensors that one run of a graph reads from end to end.

    Left out are those that it only looks rows up in: an embedding, and the tables of positions.

    Raises:
        InputError: the graph cannot be read.
    """
    total = 0
    for value in load_graph(folder / graph).initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and any(use.node.op_type not in LOOKUPS for use in value.uses()):
            total += math.ceil(math.prod(tensor.shape.numpy()) * tensor.dtype.itemsize)
    return total
