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
import onnx
import onnx_ir as ir

from retnet_tools.dtypes import convert_array
from retnet_tools.errors import InputError
from retnet_tools.formats.integrity import FileRecord
from retnet_tools.formats.storage import StoredTensors, TensorLocation, contiguous_strides
from retnet_tools.graph.contract import EXPORT_AGAIN, WEIGHTS_FILE
from retnet_tools.graph.nodes import ELEMENT_TYPES
from retnet_tools.graph.weight_tensors import BuiltGraph, WeightTensor
from retnet_tools.inputs import part_path, read_input
from retnet_tools.version import __version__
from retnet_tools.weights import Array, FileRegion, WeightSource

IR_VERSION = 11
"""The ONNX IR version that came with opset 23."""
ALIGNMENT = 4096
"""Offsets in weights.data are multiples of this, so that a runtime can map each tensor."""
MAX_GRAPH, MAX_PARTS = 1 << 22, 200_000
"""Bytes of a graph, each of which may take a hundred in memory; its nodes, their inputs and the like. A layer has 7 kB
and 200."""
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
    model = ir.Model(built.graph, ir_version=IR_VERSION, producer_name="retnet-tools", producer_version=__version__)
    ir.save(model, path)


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
        raise _no_graph(file, error) from error
    ir.external_data.set_base_dir(graph, file.parent)
    return graph


def check_graph(file: Path) -> onnx.ModelProto:
    """A graph as it is stored, found to be of a graph's size, and to take its data from weights.data beside it.

    Raises:
        InputError: it cannot be read or is absurdly large, or it has data elsewhere, of another length than its shape
            says, or past the end of the file.
    """
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(read_input(file, MAX_GRAPH))
    except InputError:
        raise
    except Exception as error:
        raise _no_graph(file, error) from error
    parts, needed = 0, 0
    for graph in _subgraphs(model.graph):
        parts += len(graph.node) + len(graph.initializer) + len(graph.input) + len(graph.output) + len(graph.value_info)
        if parts <= MAX_PARTS:
            parts += sum(len(node.input) + len(node.output) + len(node.attribute) for node in graph.node)
        if parts > MAX_PARTS or model.functions or graph.sparse_initializer:
            raise _no_graph(file, "functions, sparse tensors or too many nodes")
        if any(isinstance(text, bytes) for text in _texts(graph)):
            raise _no_graph(file, "a name that is not UTF-8")
        for tensor in _tensors(graph):
            needed = max(needed, _check_place(file, tensor))
    weights = file.parent / WEIGHTS_FILE
    if needed and not weights.is_file():
        raise InputError(f"no {weights.name} in {file.parent}", "the weights that its graphs point to", EXPORT_AGAIN)
    if needed and (found := weights.stat().st_size) < needed:
        raise InputError(f"{weights} has {found} bytes", f"at least {needed}, as its graphs say", EXPORT_AGAIN)
    return model


def _subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside it; protobuf has refused more than a hundred levels."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *((attribute.g,) if attribute.HasField("g") else ())):
                yield from _subgraphs(inner)


def _texts(graph: onnx.GraphProto) -> Iterator[object]:
    """Names and operators; protobuf leaves those as bytes that are not UTF-8."""
    yield from (graph.name, *(value.name for value in (*graph.input, *graph.output, *graph.value_info)))
    yield from (tensor.name for tensor in graph.initializer)
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (*attribute.tensors, *((attribute.t,) if attribute.HasField("t") else ()))


def _check_place(file: Path, tensor: onnx.TensorProto) -> int:
    """The byte of weights.data at which a tensor ends; 0 for one that lies in the graph."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL and not tensor.external_data:
        return 0
    what, entries = f"{tensor.name[:80]!r}", [(entry.key, entry.value) for entry in tensor.external_data]
    place = dict(entries)
    if len(place) < len(entries) or place.get("location") != WEIGHTS_FILE:
        found = f"{file} has data of {what} in {place.get('location')!r}"
        raise InputError(found, f"{WEIGHTS_FILE} beside it", EXPORT_AGAIN)
    try:
        offset, length = (int(place.get(key, "0")[:20]) for key in ("offset", "length"))
        size: int = math.ceil(math.prod(tensor.dims) * ir.DataType(tensor.data_type).itemsize)
    except (ValueError, TypeError, OverflowError) as error:
        raise _no_graph(file, f"{what}: {error}") from error
    if offset < 0 or min(tensor.dims, default=0) < 0:
        raise _no_graph(file, f"{what} of shape {list(tensor.dims)[:8]} at byte {offset}")
    if "length" in place and length != size:
        raise InputError(f"{file} gives {what} {length} bytes", f"{size}, by its shape", EXPORT_AGAIN)
    return offset + size


def _no_graph(file: Path, why: object) -> InputError:
    return InputError(f"{file} cannot be read ({why})", "an ONNX graph", EXPORT_AGAIN)


def _locate(folder: Path, tensor: ir.ExternalTensor) -> TensorLocation:
    shape, dtype = tuple(tensor.shape.numpy()), tensor.dtype
    size = math.ceil(math.prod(shape) * dtype.itemsize)
    # Types of less than a byte are packed: their bytes are all that can be read as an array.
    shape, kind = ((size,), np.dtype(np.uint8)) if dtype.itemsize < 1 else (shape, dtype.numpy())
    return TensorLocation(shape, kind, folder / WEIGHTS_FILE, tensor.offset or 0, contiguous_strides(shape))
