"""From stored to canonical tensors by a format's name table: every name explained, every tensor placed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import InputError
from retnet_tools.formats.spec import AS_STORED, NameTable, Reading, Shape, Transform
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.weights import Array, FileRegion, TensorInfo, canonical_shapes, is_floating


class _Entry(NamedTuple):
    parts: tuple[str, ...]
    transform: Transform


class MappedWeights:
    """The stored tensors under their canonical names.

    Checked at construction, from names and shapes alone. Memory of `read`: the tensor, and its stored parts while a
    transform runs.

    Args:
        stored: the tensors under the names of `reading`.
        reading: the format's.
        prefix: what the file puts before every name, for errors.

    Raises:
        InputError: a stored tensor that the table does not name, a canonical tensor that nothing fills (with the name
            expected in the file), a wrong shape, a tensor that is not floating point, a tied output projection that is
            not the embedding.
    """

    def __init__(self, stored: StoredTensors, reading: Reading, prefix: str = "") -> None:
        self._stored = stored
        check_layer_count(reading.config, stored)
        self._shapes = canonical_shapes(reading.config)
        layers = range(reading.config.num_layers)
        zeros = {template.format(i=i) for template in reading.zeros for i in layers}
        places: dict[str, str] = {}
        parts: dict[str, list[str]] = {}
        templates: dict[str, str] = {}
        for name, canonical, template in expand_names(reading.config, _tied(reading, stored)):
            places[name] = canonical
            parts.setdefault(canonical, []).append(name)
            templates[canonical] = template
        for name in stored.names():
            place = places.get(name)
            if place != "" and (place in zeros or place not in self._shapes):
                raise InputError(f"unknown tensor {prefix + name!r}", f"the names of {reading.version}", _hint(place))
        self._entries: dict[str, _Entry] = {}
        for canonical, shape in self._shapes.items():
            transform = reading.transforms.get(templates.get(canonical, ""), AS_STORED)
            names = () if canonical in zeros else tuple(parts.get(canonical, ()))
            if not names and canonical not in zeros:
                raise InputError(f"nothing in {reading.version} gives the tensor {canonical!r}", f"shape {list(shape)}")
            for name in names:
                if name not in stored.locations:
                    raise InputError(
                        f"no tensor {prefix + name!r}", f"it, for {canonical!r}", "file or configuration is incomplete"
                    )
                _check_tensor(prefix + name, stored.info(name), transform.stored_shape(shape), canonical)
            self._entries[canonical] = _Entry(names, transform)
        self._dtype = stored.info(next(entry.parts[0] for entry in self._entries.values() if entry.parts)).dtype

    def names(self) -> Iterable[str]:
        """Canonical names, in canonical order."""
        return self._entries.keys()

    def info(self, name: str) -> TensorInfo:
        """Canonical shape and stored dtype; of a tensor that is zero, the dtype of the first one that is stored."""
        parts = self._entries[name].parts
        return TensorInfo(self._shapes[name], self._stored.info(parts[0]).dtype if parts else self._dtype)

    def read(self, name: str) -> Array:
        """The canonical tensor, contiguous and owned by the caller."""
        parts, transform = self._entries[name]
        if not parts:
            return np.zeros(self._shapes[name], self._dtype)
        return np.ascontiguousarray(transform.apply([self._stored.read(part) for part in parts]))

    def region(self, name: str) -> FileRegion | None:
        """Where the bytes of a tensor that is taken as stored lie."""
        parts, transform = self._entries[name]
        return self._stored.region(parts[0]) if parts and transform is AS_STORED else None

    def blocks(self, name: str) -> Iterator[Array]:
        """The canonical tensor in pieces of whole rows of about 16 MB, or whole where it is not taken as stored."""
        parts, transform = self._entries[name]
        if parts and transform is AS_STORED:
            yield from self._stored.blocks(parts[0])
        else:
            yield self.read(name)


def check_layer_count(config: RetNetConfig, stored: StoredTensors) -> None:
    """Refuse more layers than there are tensors, before anything is listed layer by layer.

    Raises:
        InputError: a number of layers that the file cannot hold.
    """
    count = len(stored.locations)
    if config.num_layers > count:
        raise InputError(f"{config.num_layers} layers in the configuration", f"at most the {count} tensors of the file")


def is_tied(stored: StoredTensors, head: str, embedding: str) -> bool:
    """Whether the tensors allow a tied output projection: it is not stored, or is the embedding."""
    return head not in stored.locations or (embedding in stored.locations and stored.same_data(head, embedding))


def stored_name(stored: StoredTensors, names: Sequence[str]) -> str | None:
    """The first of several names of one tensor that is stored, once those that are stored are found to be equal.

    Raises:
        InputError: two of them differ.
    """
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
        raise InputError(
            f"the configuration ties the embeddings but {head!r} differs from {embedding!r}",
            "the same values",
            "correct the configuration or the file",
        )


def _hint(canonical: str | None) -> str:
    if canonical is not None:
        return f"the configuration has no place for {canonical!r}: check that it belongs to these weights"
    return "check that the configuration and the format belong to these weights"


def _check_tensor(name: str, info: TensorInfo, shape: Shape, canonical: str) -> None:
    if info.shape != shape:
        raise InputError(
            f"tensor {name!r} has shape {list(info.shape)}",
            f"{list(shape)} for {canonical!r}",
            "check that the configuration belongs to these weights",
        )
    if not is_floating(info.dtype):
        raise InputError(f"tensor {name!r} is {info.dtype}", "float16, bfloat16, float32 or float64")
