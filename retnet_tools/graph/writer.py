"""Writes an exported folder: one weights file, streamed, and the graphs that point into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import onnx_ir as ir

from retnet_tools.dtypes import convert
from retnet_tools.errors import InputError
from retnet_tools.graph.contract import WEIGHTS_FILE
from retnet_tools.graph.nodes import ELEMENT_TYPES
from retnet_tools.graph.weight_tensors import WeightTensor, stored_bytes
from retnet_tools.graph.weighted import BuiltGraph
from retnet_tools.weights import Array, WeightSource, read_blocks

IR_VERSION = 11
"""The ONNX IR version that came with opset 23."""
ALIGNMENT = 4096
"""Offsets in weights.data are multiples of this, so that a runtime can map each tensor."""


@dataclass(frozen=True)
class FilePlace:
    """Where a tensor lies in weights.data, in bytes."""

    offset: int
    length: int


BlockReader = Callable[[WeightTensor], Iterable[Array]]
"""The content of a tensor of weights.data, in pieces, in order."""


def float_blocks(source: WeightSource) -> BlockReader:
    """Reads tables, and canonical tensors in the type in which they are stored; one block in memory at a time.

    Args:
        source: where canonical tensors are read from.
    """

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
        if size := stored_bytes(tensor):
            end = _aligned(end) + size
    return end


def write_weights(
    path: Path, tensors: Iterable[WeightTensor], read: BlockReader, progress: Callable[[int], None]
) -> dict[str, FilePlace]:
    """Write weights.data, one block of a tensor in memory at a time.

    Args:
        path: the file to write.
        tensors: what to store, in order.
        read: gives the content of each that has bytes of its own.
        progress: called with the number of bytes just written.

    Returns:
        The place of each tensor, by name.

    Raises:
        InputError: a finite value that becomes infinite in the stored type, or content of another length than the
            tensor has, by tensor name.
    """
    places: dict[str, FilePlace] = {}
    tensors = list(tensors)
    with path.open("wb") as file:
        for tensor in tensors:
            if tensor.same_as is not None:
                continue
            offset = _aligned(file.tell())
            file.seek(offset)
            for block in read(tensor):
                _write_array(file, block)
            places[tensor.name] = FilePlace(offset, file.tell() - offset)
            if places[tensor.name].length != stored_bytes(tensor):
                raise InputError(
                    f"{places[tensor.name].length} bytes for tensor {tensor.name!r}",
                    f"{stored_bytes(tensor)}, by its shape {list(tensor.shape)} and type {tensor.dtype}",
                )
            progress(places[tensor.name].length)
    for tensor in tensors:
        if tensor.same_as is not None:
            places[tensor.name] = places[tensor.same_as]
    return places


def write_graph(path: Path, built: BuiltGraph, places: dict[str, FilePlace], *, producer_version: str) -> None:
    """Write a graph whose stored tensors are references into weights.data beside it."""
    for name, tensor in built.stored.items():
        place = places[name]
        built.graph.initializers[name].const_value = ir.ExternalTensor(
            WEIGHTS_FILE,
            place.offset,
            place.length,
            ELEMENT_TYPES[tensor.dtype],
            shape=ir.Shape(tensor.shape),
            name=name,
            base_dir=path.parent,
        )
    model = ir.Model(
        built.graph, ir_version=IR_VERSION, producer_name="retnet-tools", producer_version=producer_version
    )
    ir.save(model, path)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _write_array(file: IO[bytes], array: Array) -> None:
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
