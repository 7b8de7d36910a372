"""From stored to canonical tensors by a format's name table: every name explained, every tensor placed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import product

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import InputError
from retnet_tools.formats.spec import AS_STORED, Reading, Shape, SplitTable, Transform
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.weights import Array, FileRegion, TensorInfo, canonical_shapes, is_floating


@dataclass(frozen=True)
class _Entry:
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
            expected in the file), a wrong shape, a tensor that is not floating point.
    """

    def __init__(self, stored: StoredTensors, reading: Reading, prefix: str = "") -> None:
        self._stored = stored
        check_layer_count(reading.config, stored)
        self._shapes = canonical_shapes(reading.config)
        sources = expand_names(reading.config, reading.names)
        zeros = {canonical for template in reading.zeros for canonical in expand_template(reading.config, template)}
        places = {name: canonical for name, canonical, _ in sources}
        _check_known(stored, reading, places, self._shapes.keys() - zeros, prefix)
        parts: dict[str, list[str]] = {}
        templates: dict[str, str] = {}
        for name, canonical, template in sources:
            parts.setdefault(canonical, []).append(name)
            templates[canonical] = template
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
        entry = self._entries[name]
        if not entry.parts:
            return np.zeros(self._shapes[name], self._dtype)
        return np.ascontiguousarray(entry.transform.apply([self._stored.read(part) for part in entry.parts]))

    def region(self, name: str) -> FileRegion | None:
        """Where the bytes of a tensor that is taken as stored lie."""
        entry = self._entries[name]
        return self._stored.region(entry.parts[0]) if entry.parts and entry.transform is AS_STORED else None

    def blocks(self, name: str) -> Iterator[Array]:
        """The canonical tensor in pieces of whole rows of about 16 MB, or whole where it is not taken as stored."""
        entry = self._entries[name]
        if entry.parts and entry.transform is AS_STORED:
            yield from self._stored.blocks(entry.parts[0])
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


def check_tie(stored: StoredTensors, head: str, embedding: str) -> None:
    """A tied output projection, where it is stored too, must be the embedding.

    Raises:
        InputError: they differ.
    """
    if {head, embedding} <= stored.locations.keys() and not stored.same_data(head, embedding):
        raise InputError(
            f"the configuration ties the embeddings but {head!r} differs from {embedding!r}",
            "the same values",
            "correct the configuration or the file",
        )


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
        check_tie(stored, other, found[0])
    return found[0] if found else None


def expand_names(config: RetNetConfig, names: SplitTable) -> list[tuple[str, str, str]]:
    """A name table for this many layers and heads: stored name, canonical name, its template.

    Names that the table drops are left out.
    """
    return [
        (stored.format(i=i, h=h), template.format(i=i), template)
        for stored, canonical in names.items()
        for i, h in _indices(config, stored)
        for template in ((canonical,) if isinstance(canonical, str) else canonical or ())
    ]


def expand_template(config: RetNetConfig, template: str) -> list[str]:
    """A template of names for this many layers and heads."""
    return [template.format(i=i, h=h) for i, h in _indices(config, template)]


def _check_known(
    stored: StoredTensors, reading: Reading, places: Mapping[str, str], filled: Set[str], prefix: str
) -> None:
    dropped = {
        name
        for template, canonical in reading.names.items()
        if canonical is None
        for name in expand_template(reading.config, template)
    }
    for name in stored.names():
        if name not in dropped and places.get(name) not in filled:
            raise InputError(
                f"unknown tensor {prefix + name!r}", f"the names of {reading.version}", _hint(places.get(name))
            )


def _indices(config: RetNetConfig, template: str) -> Iterable[tuple[int, int]]:
    layers = range(config.num_layers if "{i}" in template else 1)
    heads = range(config.num_heads if "{h}" in template else 1)
    return product(layers, heads)


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
