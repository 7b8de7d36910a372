"""The bytes of weights.data against the checkpoint: whatever a changed one does to logits, it is found here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.dtypes import convert_array
from retnet_tools.evaluate.budget_file import WeightBudget
from retnet_tools.evaluate.checks import Check, worst
from retnet_tools.evaluate.stored_weights import StoredWeights, uncovered
from retnet_tools.graph.folder import BlockReader, float_blocks
from retnet_tools.graph.nodes import ELEMENT_TYPES
from retnet_tools.graph.positions import decay_sum_tables, phase_tables
from retnet_tools.graph.weight_tensors import WeightTensor
from retnet_tools.inputs import open_input
from retnet_tools.progress import ByteProgress
from retnet_tools.quantize.contents import QuantizedContents
from retnet_tools.quantize.methods import round_to_nearest
from retnet_tools.weights import Array, FiniteWeights, WeightSource

_TIES = 1e-15 * 8
"""Part of a number by which cos, sin and exp of two machines may be apart in float64: where that decides which float32
is the nearest, either is right."""


def judge_weights(
    stored: StoredWeights,
    config: RetNetConfig,
    source: WeightSource,
    dtype: str,
    *,
    method: str | None,
    budget: WeightBudget,
    progress: ByteProgress,
) -> list[Check]:
    """Hold every byte of weights.data to the checkpoint.

    Float weights, and weights rounded to nearest, are made again from the checkpoint and have to be the same bytes;
    between tensors are zeros. Codes are besides held to what they stand for, read by no code that wrote them: each has
    to be the one of its block that is nearest to the weight. Codes chosen by their effect (gptq) are not: their matrix
    as a whole has to be as near as its type allows.

    Args:
        source: the checkpoint.
        dtype: the float type of the export, which weights are rounded to first.
        method: of quantization; None where no weight is quantized.
    """
    finite, tensors = FiniteWeights(source), stored.tensors.values()
    again = QuantizedContents(finite, round_to_nearest, dtype) if method == "rtn" else float_blocks(finite)
    # Of float64 an export in a half type that `quantize` made of one in float32 is rounded twice.
    twice = float_blocks(_Float32Weights(finite))
    float64 = phase_tables(config, "float64") | decay_sum_tables(config, "float64")
    found: dict[str, list[Check]] = {}
    for tensor in tensors:
        if tensor.same_as is not None:
            continue
        if tensor.table is not None:
            check = _table(stored, tensor, float64)
        elif tensor.part is None:
            check = _bytes("float weights", stored, tensor, again)
            check = check if check.passed else min(check, _bytes("float weights", stored, tensor, twice), key=_measured)
        elif method == "rtn":
            check = _bytes("codes, scales and zero points", stored, tensor, again)
        else:
            continue
        found.setdefault(check.name, []).append(check)
        progress(tensor.stored_bytes)
    for name in stored.names():
        if (format := stored.format(name)) is not None:
            weight = convert_array(name, finite.read(name), ELEMENT_TYPES[dtype].numpy()).astype(np.float64)
            if method == "rtn":
                check = _nearest(stored, name, weight, budget.code_steps)
            else:
                check = _lost(stored, name, weight, getattr(budget, format.type.name))
            found.setdefault(check.name, []).append(check)
    return [*map(worst, found.values()), _between(stored)]


class _Float32Weights(FiniteWeights):
    """Tensors of float64 rounded to float32 as they are read."""

    def blocks(self, name: str) -> Iterator[Array]:
        """The tensor in pieces along its first axis."""
        kind = np.dtype(np.float32) if self.info(name).dtype == np.float64 else self.info(name).dtype
        return (convert_array(name, block, kind) for block in super().blocks(name))


def _measured(check: Check) -> float:
    return check.measured


def _bytes(name: str, stored: StoredWeights, tensor: WeightTensor, again: BlockReader) -> Check:
    """Bytes that are others than the checkpoint gives."""
    region, wrong, first = stored.regions[tensor.name], 0, -1
    with open_input(stored.file) as file:
        file.seek(region.offset)
        done = 0
        for block in again(tensor):
            expected = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
            found = np.frombuffer(file.read(expected.size), np.uint8)
            differ = np.flatnonzero(found != expected[: found.size])
            first = done + int(differ[0]) if first < 0 and differ.size else first
            wrong += differ.size + expected.size - found.size
            done += expected.size
    where = f"{tensor.name}, byte {first}" if wrong else ""
    return Check("weights", name, wrong, 0, "bytes changed", where)


def _table(stored: StoredWeights, tensor: WeightTensor, float64: Mapping[str, Array]) -> Check:
    """Numbers that are not the float32 next to what float64 gives."""
    values = stored.bytes_of(tensor).view(np.float32).reshape(tensor.shape)
    exact = float64[tensor.name]
    room = np.abs(exact) * _TIES
    with np.errstate(all="ignore"):
        low, high = (
            (values.astype(np.float64) + np.nextafter(values, np.float32(end)).astype(np.float64)) / 2
            for end in (-np.inf, np.inf)
        )
    wrong = np.flatnonzero(~((low - room <= exact) & (exact <= high + room)))
    where = f"{tensor.name}, element {wrong[0]}" if wrong.size else ""
    return Check("weights", "tables of positions", wrong.size, 0, "numbers wrong", where)


def _nearest(stored: StoredWeights, name: str, weight: Array, steps: float) -> Check:
    """By how many steps a code is further from its weight than the nearest of its block."""
    parts, format = stored.parts(name), stored.format(name)
    assert format is not None
    codes = parts["codes"].astype(np.float64)
    scale, zeros = (
        np.repeat(parts[part].astype(np.float64), format.block_size, 1)[:, : weight.shape[1]]
        for part in ("scales", "zero_points")
    )
    usable = np.abs(scale) >= np.finfo(np.float32).tiny
    place = np.divide(weight, scale, out=np.zeros_like(weight), where=usable) + zeros
    further = np.abs(place - codes) - np.abs(place - np.clip(np.rint(place), 0, format.top))
    further[~usable] = np.abs(codes - zeros)[~usable]
    at = np.unravel_index(int(further.argmax()), further.shape)
    where = f"{name}, row {at[0]}, column {at[1]}"
    return Check("weights", "nearest codes", float(further[at]), steps, "steps", where)


def _lost(stored: StoredWeights, name: str, weight: Array, parts: float) -> Check:
    """What a matrix has lost, in parts of it."""
    lost = np.sqrt(np.square(stored.read(name) - weight).sum() / (np.square(weight).sum() or 1.0))
    return Check("weights", "what matrices lose", float(lost), parts, "parts", name)


def _between(stored: StoredWeights) -> Check:
    """Bytes between tensors, and after the last, that are not 0."""
    size, wrong, where = stored.file.stat().st_size, 0, ""
    with open_input(stored.file) as file:
        for start, end in uncovered(stored.regions.values(), size):
            file.seek(start)
            other = np.flatnonzero(np.frombuffer(file.read(end - start), np.uint8))
            if other.size:
                wrong, where = wrong + other.size, where or f"byte {start + int(other[0])}"
    return Check("weights", "between tensors", wrong, 0, "bytes not 0", where)
