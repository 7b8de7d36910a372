"""Reads an exported folder back: what its graphs consist of, and where each tensor lies in weights.data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from retnet_tools.errors import InputError
from retnet_tools.formats.storage import StoredTensors, TensorLocation, contiguous_strides
from retnet_tools.graph.contract import EXPORT_AGAIN, WEIGHTS_FILE


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
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"no {name} in {folder}", "every graph that its manifest lists", EXPORT_AGAIN)
        graph = load_graph(folder / name)
        operators = Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in graph.all_nodes())
        counts[name] = dict(sorted(operators.items(), key=lambda item: (-item[1], item[0])))
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                location = _locate(folder, name, tensor)
                if locations.setdefault(tensor.name or "", location) != location:
                    raise InputError(
                        f"{folder / name} places {tensor.name!r} elsewhere than another graph",
                        "every tensor stored once",
                        EXPORT_AGAIN,
                    )
    _check_size(folder / WEIGHTS_FILE, locations)
    first: dict[tuple[int, int], str] = {}
    for name, location in locations.items():
        first.setdefault((location.offset, location.span * location.dtype.itemsize), name)
    return ExportedGraphs(counts, StoredTensors({name: locations[name] for name in first.values()}))


def load_graph(file: Path) -> ir.Graph:
    """A graph without its external data.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return ir.load(file).graph
    except Exception as error:
        raise InputError(f"{file} cannot be read ({error})", "an ONNX graph", EXPORT_AGAIN) from error


def _locate(folder: Path, graph: str, tensor: ir.ExternalTensor) -> TensorLocation:
    if tensor.location != WEIGHTS_FILE:
        found = f"{folder / graph} has data in {str(tensor.location)!r}"
        raise InputError(found, f"{WEIGHTS_FILE} beside it", EXPORT_AGAIN)
    shape, dtype = tuple(tensor.shape.numpy()), tensor.dtype
    size = math.ceil(math.prod(shape) * dtype.itemsize)
    if tensor.length not in (None, size):
        found = f"{folder / graph} gives {tensor.name!r} {tensor.length} bytes"
        raise InputError(found, f"{size}, by its shape", EXPORT_AGAIN)
    # Types of less than a byte are packed: their bytes are all that can be read as an array.
    shape, kind = ((size,), np.dtype(np.uint8)) if dtype.itemsize < 1 else (shape, dtype.numpy())
    return TensorLocation(shape, kind, folder / WEIGHTS_FILE, tensor.offset or 0, contiguous_strides(shape))


def _check_size(file: Path, locations: Mapping[str, TensorLocation]) -> None:
    if not locations:
        return
    if not file.is_file():
        raise InputError(f"no {file.name} in {file.parent}", "the weights that its graphs point to", EXPORT_AGAIN)
    needed = max(t.offset + t.span * t.dtype.itemsize for t in locations.values())
    if (found := file.stat().st_size) < needed:
        raise InputError(f"{file} has {found} bytes", f"at least {needed}, as its graphs say", EXPORT_AGAIN)
