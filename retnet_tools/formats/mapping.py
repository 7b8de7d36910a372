"""From stored to canonical tensors: every name explained by a format's table, every tensor placed and transformed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import InputError
from retnet_tools.formats.spec import AS_STORED, NameTable, Reading, Shape, Transform
from retnet_tools.formats.storage import LazyTensor, StoredTensors
from retnet_tools.weights import Array, TensorInfo, canonical_shapes, is_floating


@dataclass(frozen=True)
class _MadeTensor(LazyTensor):
    """A tensor that a transform makes from stored ones, or zero where there are none. Memory of `read`: both."""

    parts: tuple[LazyTensor, ...]
    transform: Transform

    def read(self) -> Array:
        if not self.parts:
            return np.zeros(self.shape, self.dtype)
        return np.ascontiguousarray(self.transform.apply([part.read() for part in self.parts]))

    def blocks(self) -> Iterator[Array]:
        yield self.read()


def map_weights(stored: StoredTensors, reading: Reading, prefix: str = "") -> StoredTensors:
    """The stored tensors under their canonical names and in canonical order, from names and shapes alone.

    Args:
        stored: the tensors under the names of `reading`.
        prefix: what the file puts before every name, for errors.

    Raises:
        InputError: a stored tensor that the table does not name, a canonical tensor that nothing fills (with the name
            expected in the file), a wrong shape, a tensor that is not floating point, a tied output projection that is
            not the embedding.
    """
    check_layer_count(reading.config, stored)
    shapes = canonical_shapes(reading.config)
    zeros = {template.format(i=i) for template in reading.zeros for i in range(reading.config.num_layers)}
    places: dict[str, str] = {}
    parts: dict[str, list[str]] = {}
    transforms: dict[str, Transform] = {}
    for name, canonical, template in expand_names(reading.config, _tied(reading, stored)):
        places[name] = canonical
        parts.setdefault(canonical, []).append(name)
        transforms[canonical] = reading.transforms.get(template, AS_STORED)
    for name in stored.names():
        place = places.get(name)
        if place != "" and (place in zeros or place not in shapes):
            action = "check that the configuration and the format belong to these weights"
            if place is not None:
                action = f"the configuration has no place for {place!r}: check that it belongs to these weights"
            raise InputError(f"unknown tensor {prefix + name!r}", f"the names of {reading.version}", action)
    found: dict[str, LazyTensor] = {}
    for canonical, shape in shapes.items():
        if canonical in zeros:
            continue
        if canonical not in parts:
            raise InputError(f"nothing in {reading.version} gives the tensor {canonical!r}", f"shape {list(shape)}")
        transform = transforms[canonical]
        for name in parts[canonical]:
            if name not in stored.locations:
                missing = f"no tensor {prefix + name!r}"
                raise InputError(missing, f"it, for {canonical!r}", "file or configuration is incomplete")
            _check_tensor(prefix + name, stored.locations[name], transform.stored_shape(shape), canonical)
        first, *others = (stored.locations[name] for name in parts[canonical])
        made = _MadeTensor(shape, first.dtype, (first, *others), transform)
        found[canonical] = first if transform is AS_STORED else made
    dtype = next(iter(found.values())).dtype  # of tensors that are zero
    return StoredTensors(
        {name: found.get(name) or _MadeTensor(shape, dtype, (), AS_STORED) for name, shape in shapes.items()}
    )


def check_layer_count(config: RetNetConfig, stored: StoredTensors) -> None:
    """Refuse more layers than there are tensors, before anything is listed layer by layer."""
    count = len(stored.locations)
    if config.num_layers > count:
        raise InputError(f"{config.num_layers} layers in the configuration", f"at most the {count} tensors of the file")


def is_tied(stored: StoredTensors, head: str, embedding: str) -> bool:
    """Whether the tensors allow a tied output projection: it is not stored, or is the embedding."""
    return head not in stored.locations or (embedding in stored.locations and stored.same_data(head, embedding))


def stored_name(stored: StoredTensors, names: Sequence[str]) -> str | None:
    """The first of several names of one tensor that is stored, once those that are stored are found to be equal."""
    found = [name for name in names if name in stored.locations]
    for other in found[1:]:
        _check_tie(stored, other, found[0])
    return found[0] if found else None


def expand_names(config: RetNetConfig, names: NameTable) -> list[tuple[str, str, str]]:
    """A name table for this many layers and heads: stored name, canonical name, its template; both empty where the
    table drops it."""
    return [
        (stored.format(i=i, h=h), template.format(i=i), template)
        for stored, canonical in names.items()
        for i in range(config.num_layers if "{i}" in stored else 1)
        for h in range(config.num_heads if "{h}" in stored else 1)
        for template in (canonical if isinstance(canonical, tuple) else (canonical or "",))
    ]


def _tied(reading: Reading, stored: StoredTensors) -> NameTable:
    """The name table; of a tied output projection that is stored too, once it is found to be the embedding."""
    stored_as: Mapping[object, str] = {canonical: name for name, canonical in reading.names.items()}
    head = stored_as.get("lm_head.weight")
    if head is None or not reading.config.tie_word_embeddings:
        return reading.names
    _check_tie(stored, head, stored_as["embedding.weight"])
    return {**reading.names, head: None}


def _check_tie(stored: StoredTensors, head: str, embedding: str) -> None:
    if not is_tied(stored, head, embedding) and embedding in stored.locations:
        found = f"the configuration ties the embeddings but {head!r} differs from {embedding!r}"
        raise InputError(found, "the same values", "correct the configuration or the file")


def _check_tensor(name: str, info: TensorInfo, shape: Shape, canonical: str) -> None:
    if info.shape != shape:
        found, action = f"tensor {name!r} has shape {list(info.shape)}", "the configuration belongs to these weights"
        raise InputError(found, f"{list(shape)} for {canonical!r}", f"check that {action}")
    if not is_floating(info.dtype):
        raise InputError(f"tensor {name!r} is {info.dtype}", "float16, bfloat16, float32 or float64")


TRANSPOSED = Transform(lambda shape: shape[::-1], lambda parts: parts[0].T)
"""A matrix `[in, out]`, used as x W."""


def halves_to_pairs(head_k_dim: int) -> Transform:
    """Rows `[H*K, D]` of q or k where row i of a head is rotated with row i + K/2, put into adjacent pairs. q and k are
    permuted alike, so their products stay what they are."""

    def apply(parts: Sequence[Array]) -> Array:
        rows = parts[0]
        halves = rows.reshape(-1, 2, head_k_dim // 2, rows.shape[-1])  # [H*K, D] -> [H, 2, K/2, D]
        return halves.swapaxes(1, 2).reshape(rows.shape)

    def invert(rows: Array) -> Array:
        pairs = rows.reshape(-1, head_k_dim // 2, 2, rows.shape[-1])  # [H*K, D] -> [H, K/2, 2, D]
        return pairs.swapaxes(1, 2).reshape(rows.shape)

    return Transform(lambda shape: shape, apply, invert)


def joined_heads(num_heads: int) -> Transform:
    """One matrix `[D, K]` a head, used as x W, joined to `[H*K, D]`."""
    return Transform(
        lambda shape: (shape[1], shape[0] // num_heads), lambda parts: np.concatenate([part.T for part in parts])
    )


def row_range(start: int, size: int, total: int) -> Transform:
    """One of several matrices that are stored as one, below each other: `size` rows of `total`, from `start` on."""
    return Transform(lambda shape: (total, *shape[1:]), lambda parts: parts[0][start : start + size].copy())


def head_part(index: int, count: int, num_heads: int) -> Transform:
    """One of several matrices whose rows are stored head by head: N rows of the first, of the second, ..., for each
    head, `[H * count * N, ...]`."""

    def apply(parts: Sequence[Array]) -> Array:
        rows = parts[0]
        by_head = rows.reshape(num_heads, count, -1, *rows.shape[1:])  # [H*count*N, ...] -> [H, count, N, ...]
        return by_head[:, index].reshape(-1, *rows.shape[1:])

    return Transform(lambda shape: (count * shape[0], *shape[1:]), apply)
