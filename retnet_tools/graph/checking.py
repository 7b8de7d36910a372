"""Whether a graph file is one that may be opened: of a graph's size, its data where an export has it.

It is asked of every graph before ONNX Runtime sees it, so that this module imports no more than the messages of ONNX.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import onnx

from retnet_tools.errors import InputError
from retnet_tools.graph.contract import EXPORT_AGAIN, WEIGHTS_FILE
from retnet_tools.inputs import read_input

MAX_GRAPH, MAX_PARTS = 1 << 22, 200_000
"""Bytes of a graph, each of which may take a hundred in memory; its nodes, their inputs and the like. A layer has 7 kB
and 200."""
_BITS = {"FLOAT": 32, "DOUBLE": 64, "BOOL": 8}
"""Of the types whose names do not say how many they have."""


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
        raise no_graph(file, error) from error
    if not model.graph.output:
        raise no_graph(file, "it gives nothing")
    parts, needed = 0, 0
    for graph in _subgraphs(model.graph):
        parts += len(graph.node) + len(graph.initializer) + len(graph.input) + len(graph.output) + len(graph.value_info)
        if parts <= MAX_PARTS:
            parts += sum(len(node.input) + len(node.output) + len(node.attribute) for node in graph.node)
        if parts > MAX_PARTS or model.functions or graph.sparse_initializer:
            raise no_graph(file, "functions, sparse tensors or too many nodes")
        if any(isinstance(text, bytes) for text in _texts(graph)):
            raise no_graph(file, "a name that is not UTF-8")
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
        size: int = -(-math.prod(tensor.dims) * _bits(tensor.data_type) // 8)
    except (ValueError, TypeError, OverflowError) as error:
        raise no_graph(file, f"{what}: {error}") from error
    if offset < 0 or min(tensor.dims, default=0) < 0:
        raise no_graph(file, f"{what} of shape {list(tensor.dims)[:8]} at byte {offset}")
    if "length" in place and length != size:
        raise InputError(f"{file} gives {what} {length} bytes", f"{size}, by its shape", EXPORT_AGAIN)
    return offset + size


def _bits(data_type: int) -> int:
    """Of an element; a ValueError for what has no size of its own."""
    name = str(onnx.TensorProto.DataType.Name(data_type))
    if name in _BITS:
        return _BITS[name]
    if (digits := re.search(r"\d+", name)) is None:
        raise ValueError(f"elements of type {name}")
    # FLOAT8E4M3FN has 8.
    return int(digits[0])


def no_graph(file: Path, why: object) -> InputError:
    """The error for a file that is no graph, or none of ours."""
    return InputError(f"{file} cannot be read ({why})", "an ONNX graph", EXPORT_AGAIN)
