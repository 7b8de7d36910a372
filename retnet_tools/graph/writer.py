"""Writes an exported folder: one weights file, streamed, and the graphs that point into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from retnet_tools import __version__
from retnet_tools.dtypes import convert
from retnet_tools.errors import InputError
from retnet_tools.graph.contract import WEIGHTS_FILE
from retnet_tools.graph.nodes import ELEMENT_TYPES
from retnet_tools.graph.weight_tensors import WeightTensor
from retnet_tools.graph.weighted import BuiltGraph
from retnet_tools.weights import Array, FileRegion, WeightSource, read_blocks

IR_VERSION = 11
"""The ONNX IR version that came with opset 23."""
ALIGNMENT = 4096
"""Offsets in weights.data are multiples of this, so that a runtime can map each tensor."""
BlockReader = Callable[[WeightTensor], Iterable[Array]]
"""The content of a tensor of weights.data, in pieces, in order."""


def float_blocks(source: WeightSource) -> BlockReader:
    """Reads tables, and canonical tensors in the type in which they are stored; one block in memory at a time."""

    def read(tensor: WeightTensor) -> Iterator[Array]:
        if tensor.table is not None:
            yield tensor.table
        for name in tensor.sources:
            for block in read_blocks(source, name):
                yield convert(name, block, ELEMENT_TYPES[tensor.dtype].numpy())

    return read


def file_bytes(tensors: Iterable[WeightTensor]) -> int:
    """Size of a weights.data that holds these, each at the next multiple of `ALIGNMENT`."""
    end = 0
    for tensor in tensors:
        if size := tensor.stored_bytes:
            end = _aligned(end) + size
    return end


def write_weights(
    path: Path, tensors: Iterable[WeightTensor], read: BlockReader, progress: Callable[[int], None]
) -> dict[str, FileRegion]:
    """Write weights.data, one block of a tensor in memory at a time; gives the place of each tensor by name.

    Args:
        tensors: what to store, in order.
        read: gives the content of each that has bytes of its own.
        progress: called with the number of bytes just written.

    Raises:
        InputError: a finite value that becomes infinite in the stored type, or content of another length than the
            tensor has, by tensor name.
    """
    tensors, places = list(tensors), {}
    with path.open("wb") as file:
        for tensor in tensors:
            if tensor.same_as is not None:
                continue
            offset = _aligned(file.tell())
            file.seek(offset)
            for block in read(tensor):
                file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
            written = file.tell() - offset
            if written != tensor.stored_bytes:
                raise InputError(
                    f"{written} bytes for tensor {tensor.name!r}",
                    f"{tensor.stored_bytes}, by its shape {list(tensor.shape)} and type {tensor.dtype}",
                )
            places[tensor.name] = FileRegion(path, offset, written)
            progress(written)
    return places | {tensor.name: places[tensor.same_as] for tensor in tensors if tensor.same_as is not None}


def write_graph(path: Path, built: BuiltGraph, places: dict[str, FileRegion]) -> None:
    """Write a graph whose stored tensors are references into weights.data beside it."""
    for name, tensor in built.stored.items():
        built.graph.initializers[name].const_value = ir.ExternalTensor(
            WEIGHTS_FILE,
            places[name].offset,
            places[name].nbytes,
            ELEMENT_TYPES[tensor.dtype],
            shape=ir.Shape(tensor.shape),
            name=name,
            base_dir=path.parent,
        )
    model = ir.Model(built.graph, ir_version=IR_VERSION, producer_name="retnet-tools", producer_version=__version__)
    ir.save(model, path)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
