"""Hidden states of calibration tokens: on disk, some sequences in memory at a time, and refused where not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from retnet_tools.errors import InputError
from retnet_tools.weights import Array

BATCH_TOKENS = 2048
"""Tokens whose activations are in memory at a time; at least one sequence."""


def not_finite(name: str, what: str) -> InputError:
    """The error for activations that overflow.

    Args:
        name: of the part of the model.
        what: it is given or gives.
    """
    return InputError(
        f"the calibration text gives {name} {what} that are not finite in float32",
        "a model that float32 can compute with",
        "use --method rtn without a target",
    )


def batches(sequences: Array) -> list[slice]:
    """Some sequences of `[S, T]` at a time."""
    size = max(1, BATCH_TOKENS // sequences.shape[1])
    return [slice(start, start + size) for start in range(0, len(sequences), size)]


def write_states(path: Path, count: int, parts: Iterable[Array]) -> None:
    """Store hidden states `[S, T, D]` float32 of S sequences, which come in parts `[s, T, D]`, in numpy's format."""
    parts = iter(parts)
    first = next(parts)
    shape = (count, *first.shape[1:])
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for part in chain((first,), parts):
            file.write(np.ascontiguousarray(part, dtype="<f4").data)


def read_states(path: Path, parts: Iterable[slice]) -> Iterator[Array]:
    """Parts of the sequences of a file, `[s, T, D]` float32 each."""
    states = np.load(path, mmap_mode="r")
    for part in parts:
        yield np.array(states[part])
