"""The weights of an exported folder, read back from weights.data: as numbers, and held to those of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import InputError
from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.graph.contract import EXPORT_AGAIN, WEIGHTS_FILE
from retnet_tools.graph.folder import load_graph, read_graphs
from retnet_tools.graph.nodes import ELEMENT_TYPES
from retnet_tools.graph.weight_tensors import WeightTensor
from retnet_tools.inputs import open_input
from retnet_tools.weights import Array, FileRegion, TensorInfo, WeightSource, canonical_shapes


class StoredWeights(WeightSource):
    """The weights of a folder by canonical name in float64, quantized ones decoded: (code - zero_point) * scale.

    Memory: the tensor that is read, and its codes as bytes.

    Args:
        tensors: what the folder should hold, by name.

    Raises:
        InputError: graphs that do not say where these are, or give them another shape or type.
    """

    def __init__(self, folder: Path, config: RetNetConfig, graphs: Iterable[str], tensors: Mapping[str, WeightTensor]):
        self.file, self.tensors = folder / WEIGHTS_FILE, tensors
        self._config, self._shapes = config, canonical_shapes(config)
        self.regions = _regions(folder, list(graphs), tensors)
        self._holders: dict[str, list[WeightTensor]] = {}
        for tensor in tensors.values():
            for source in tensor.sources if tensor.same_as is None else ():
                self._holders.setdefault(source, []).append(tensor)

    def names(self) -> Iterable[str]:
        """Canonical names."""
        return self._shapes.keys()

    def info(self, name: str) -> TensorInfo:
        """As it is read."""
        return TensorInfo(self._shapes[name], np.dtype(np.float64))

    def read(self, name: str) -> Array:
        """A tensor in float64."""
        parts, format = self.parts(name), self.format(name)
        if format is None:
            return parts["float"].astype(np.float64)
        steps: Array = parts["codes"].astype(np.float64)
        for part, apply in (("zero_points", np.subtract), ("scales", np.multiply)):
            spread = np.repeat(parts[part].astype(np.float64), format.block_size, 1)[:, : steps.shape[1]]
            apply(steps, spread, out=steps)
        return steps

    def format(self, name: str) -> BlockFormat | None:
        """How a matrix is quantized; None of a tensor that is not."""
        part = self._holders[name][0].part
        return None if part is None else part.format

    def parts(self, name: str) -> dict[str, Array]:
        """A tensor as it is stored, `float`, or the codes `[N, K]`, scales and zero points `[N, blocks]` of a matrix.

        Codes count from 0, those of symmetric matrices too, whose zero point is the middle.
        """
        found: dict[str, Array] = {}
        for tensor in self._holders[name]:
            start = sum(self._shapes[source][0] for source in tensor.sources[: tensor.sources.index(name)])
            rows = slice(start, start + self._shapes[name][0])
            if tensor.part is None:
                return {"float": self._array(tensor)[rows].reshape(self._shapes[name])}
            found[tensor.part.name] = self._part(tensor)[rows]
        if (format := self.format(name)) is not None and format.symmetric:
            found["zero_points"] = np.full(found["scales"].shape, format.middle, dtype=np.uint8)
        return found

    def bytes_of(self, tensor: WeightTensor) -> Array:
        """What is stored of a tensor."""
        region = self.regions[tensor.name]
        with open_input(self.file) as file:
            file.seek(region.offset)
            return np.frombuffer(file.read(region.nbytes), np.uint8)

    def _array(self, tensor: WeightTensor) -> Array:
        return self.bytes_of(tensor).view(ELEMENT_TYPES[tensor.dtype].numpy()).reshape(tensor.shape)

    def _part(self, tensor: WeightTensor) -> Array:
        """All rows of a part of quantized matrices, `[N, K or blocks]`."""
        part = tensor.part
        assert part is not None
        rows, columns = sum(self._shapes[s][0] for s in tensor.sources), self._shapes[tensor.sources[0]][1]
        blocks = part.format.blocks(columns)
        if part.name == "scales":
            return self._array(tensor) if part.layout == "rows" else self._array(tensor).T
        count = columns if part.name == "codes" else blocks
        if part.layout == "rows":
            codes = _unpacked(self.bytes_of(tensor).reshape(rows, -1), part.format.bits)
            return codes[:, :count]
        flat = _unpacked(self.bytes_of(tensor)[None], part.format.bits)[0, : count * rows]
        codes = flat.reshape(count, rows).T
        # Symmetric codes are signed there: the middle is 0.
        return codes ^ np.uint8(part.format.middle) if part.format.symmetric else codes


def _unpacked(data: Array, bits: int) -> Array:
    """Bytes `[n, m]` as codes `[n, m * 8 / bits]`, the low bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (data[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(len(data), -1)


def _regions(folder: Path, graphs: list[str], tensors: Mapping[str, WeightTensor]) -> dict[str, FileRegion]:
    """Where each tensor lies, as all graphs say."""
    read_graphs(folder, graphs)
    found: dict[str, ir.ExternalTensor] = {}
    for graph in graphs:
        for value in load_graph(folder / graph).initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                found[value.const_value.name or ""] = value.const_value
    if unknown := sorted(found.keys() - tensors.keys()):
        raise InputError(f"{folder} holds a tensor {unknown[0]!r}", "those of its model alone", EXPORT_AGAIN)
    regions: dict[str, FileRegion] = {}
    for name, tensor in tensors.items():
        stored = found.get(name)
        shape = None if stored is None else tuple(stored.shape.numpy())
        if stored is None or (stored.dtype, shape) != (ELEMENT_TYPES[tensor.dtype], tensor.shape):
            raise InputError(
                f"{folder} holds {'no' if stored is None else 'another'} tensor {name!r}",
                f"{tensor.dtype} of shape {list(tensor.shape)}, as its model has it",
                EXPORT_AGAIN,
            )
        size = tensor.stored_bytes or regions[tensor.same_as or ""].nbytes
        regions[name] = FileRegion(folder / WEIGHTS_FILE, stored.offset or 0, size)
    return regions


def uncovered(regions: Iterable[FileRegion], size: int) -> Iterator[tuple[int, int]]:
    """Starts and ends of what lies between the regions of a file."""
    end = 0
    for region in sorted(set(regions), key=lambda region: region.offset):
        if region.offset > end:
            yield end, region.offset
        end = max(end, region.offset + region.nbytes)
    if size > end:
        yield end, size
