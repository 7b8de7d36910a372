"""The files of an exported folder: weights.data, streamed, and the graphs that point into it; written and read back."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx.helper
import onnx_ir as ir

from retnet_tools.dtypes import convert_array
from retnet_tools.errors import InputError
from retnet_tools.file_records import FileRecord
from retnet_tools.formats.storage import StoredTensors, TensorLocation, contiguous_strides
from retnet_tools.graph.checking import check_graph, no_graph
from retnet_tools.graph.contract import EXPORT_AGAIN, WEIGHTS_FILE
from retnet_tools.graph.nodes import ELEMENT_TYPES
from retnet_tools.graph.weight_tensors import BuiltGraph, WeightTensor
from retnet_tools.inputs import part_path
from retnet_tools.version import __version__
from retnet_tools.weights import Array, FileRegion, WeightSource

ALIGNMENT = 4096
"""Offsets in weights.data are multiples of this, so that a runtime can map each tensor."""
# What it warns of is an error here, or none.
logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)
BlockReader = Callable[[WeightTensor], Iterable[Array]]
"""The content of a tensor of weights.data, in pieces, in order."""


def float_blocks(source: WeightSource) -> BlockReader:
    """Reads tables, and canonical tensors in the type in which they are stored; one block in memory at a time."""

    def read(tensor: WeightTensor) -> Iterator[Array]:
        if tensor.table is not None:
            yield tensor.table
        for name in tensor.sources:
            for block in source.blocks(name):
                yield convert_array(name, block, ELEMENT_TYPES[tensor.dtype].numpy())

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
) -> tuple[dict[str, FileRegion], FileRecord]:
    """Write weights.data, one block of a tensor in memory at a time; gives the place of each tensor, and its hash.

    Args:
        tensors: what to store, in order.
        read: gives the content of each that has bytes of its own.
        progress: called with the number of bytes just written.

    Raises:
        InputError: a finite value that becomes infinite in the stored type, or content of another length than the
            tensor has, by tensor name.
    """
    tensors, places, digest = list(tensors), {}, hashlib.sha256()
    with path.open("wb") as file, ThreadPoolExecutor(1) as pool:

        def write(data: Any) -> None:
            # Both release the interpreter's lock.
            hashed = pool.submit(digest.update, data)
            file.write(data)
            hashed.result()

        for tensor in tensors:
            if tensor.same_as is not None:
                continue
            offset = _aligned(file.tell())
            write(bytes(offset - file.tell()))
            for block in read(tensor):
                write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
            written = file.tell() - offset
            if written != tensor.stored_bytes:
                raise InputError(
                    f"{written} bytes for tensor {tensor.name!r}",
                    f"{tensor.stored_bytes}, by its shape {list(tensor.shape)} and type {tensor.dtype}",
                )
            places[tensor.name] = FileRegion(path, offset, written)
            progress(written)
        record = FileRecord(file.tell(), digest.hexdigest())
    places |= {tensor.name: places[tensor.same_as] for tensor in tensors if tensor.same_as is not None}
    return places, record


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
    model = ir.Model(
        built.graph, ir_version=ir_version(built.graph), producer_name="retnet-tools", producer_version=__version__
    )
    ir.save(model, path)


def ir_version(graph: ir.Graph) -> int:
    """The ONNX IR version that came with the opset of a graph."""
    version: int = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", graph.opset_imports[""])])
    return version


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class ExportedGraphs:
    """The graphs of an exported folder, no weights read.

    Attributes:
        node_counts: for each graph file, its nodes by operator; `com.microsoft.QuickGelu` outside ai.onnx.
        tensors: the tensors of weights.data under the names that the graphs give them; of several names for the same
            bytes the first.
    """

    node_counts: Mapping[str, Mapping[str, int]]
    tensors: StoredTensors


def read_graphs(folder: Path, names: Iterable[str]) -> ExportedGraphs:
    """Load graphs, those that a manifest lists, without their external data; weights.data must hold what they point to.

    Raises:
        InputError: a graph that is missing or cannot be read, external data outside weights.data, two graphs that
            place one tensor differently, weights.data missing or too short.
    """
    counts: dict[str, dict[str, int]] = {}
    locations: dict[str, TensorLocation] = {}
    for name in names:
        path = part_path(folder, name)
        if path is None or not path.is_file():
            raise InputError(f"no {name} in {folder}", "every graph that its manifest lists", EXPORT_AGAIN)
        graph = load_graph(folder / name)
        operators = Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in graph.all_nodes())
        counts[name] = dict(sorted(operators.items(), key=lambda item: (-item[1], item[0])))
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                location = _locate(folder, tensor)
                if locations.setdefault(tensor.name or "", location) != location:
                    raise InputError(
                        f"{folder / name} places {tensor.name!r} elsewhere than another graph",
                        "every tensor stored once",
                        EXPORT_AGAIN,
                    )
    first: dict[tuple[int, int], str] = {}
    for name, location in locations.items():
        first.setdefault((location.offset, location.span * location.dtype.itemsize), name)
    return ExportedGraphs(counts, StoredTensors({name: locations[name] for name in first.values()}))


def load_graph(file: Path) -> ir.Graph:
    """A graph without its external data.

    Raises:
        InputError: as `check_graph`.
    """
    model = check_graph(file)
    try:
        graph = ir.from_proto(model).graph
    except Exception as error:
        raise no_graph(file, error) from error
    ir.external_data.set_base_dir(graph, file.parent)
    return graph


def _locate(folder: Path, tensor: ir.ExternalTensor) -> TensorLocation:
    shape, dtype = tuple(tensor.shape.numpy()), tensor.dtype
    size = math.ceil(math.prod(shape) * dtype.itemsize)
    # Types of less than a byte are packed: their bytes are all that can be read as an array.
    shape, kind = ((size,), np.dtype(np.uint8)) if dtype.itemsize < 1 else (shape, dtype.numpy())
    return TensorLocation(shape, kind, folder / WEIGHTS_FILE, tensor.offset or 0, contiguous_strides(shape))
