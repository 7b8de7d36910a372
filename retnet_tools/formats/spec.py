"""A checkpoint format as data, and the checkpoint that reading one gives.

A format is one frozen `FormatSpec` in one file. Its `read` resolves the format's own configuration to a `Reading`:
the `RetNetConfig`, and a table from the names that the format stores to the canonical ones.

    NAMES = {
        "embed_tokens.weight": "embedding.weight",
        "layers.{i}.ffn.fc1.weight": "layers.{i}.ffn.gate_proj.weight",
        "layers.{i}.retentions.{h}.W_Q": "layers.{i}.retention.q_proj.weight",   # all heads make one tensor
        "layers.{i}.ffn.both.weight": ("layers.{i}.ffn.gate_proj.weight", "layers.{i}.ffn.up_proj.weight"),
        "retnet_rel_pos.angle": None,                                            # dropped on purpose
    }

`{i}` runs over layers and `{h}` over heads. A stored tensor that fills several canonical ones needs a transform for
each, which takes its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import InputError
from retnet_tools.formats.files import CheckpointFiles
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.weights import Array, FileRegion, TensorInfo, WeightSource, canonical_shapes, is_floating

Shape = tuple[int, ...]
NameTable = Mapping[str, str | None]
SplitTable = Mapping[str, str | tuple[str, ...] | None]


@dataclass(frozen=True)
class Transform:
    """How the stored tensors of one canonical tensor become it.

    Attributes:
        stored_shape: shape of each stored part, from the canonical shape.
        apply: the canonical tensor, from the stored parts in the order of `{h}`.
        invert: the stored tensor from the canonical one, for formats that are written; one part only.
    """

    stored_shape: Callable[[Shape], Shape]
    apply: Callable[[Sequence[Array]], Array]
    invert: Callable[[Array], Array] = lambda canonical: canonical


AS_STORED = Transform(lambda shape: shape, lambda parts: parts[0])


@dataclass(frozen=True)
class Reading:
    """A format's configuration, resolved.

    Attributes:
        version: which release of the format, for people.
        names: from stored to canonical names, as templates; None drops a tensor on purpose, a tuple splits it.
        prefix: what every stored name starts with, before the names of the table.
        transforms: by canonical template; tensors without one are taken as stored.
        config_files: the files that the configuration was read from.
        notes: what the user should know about the reading.
    """

    config: RetNetConfig
    version: str
    names: SplitTable
    prefix: str = ""
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    config_files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Writing:
    """A model as a format stores it.

    Attributes:
        documents: file name to JSON, the configuration last.
        names: from stored to canonical names, as templates.
        weights_file: `model.safetensors`, which may become shards, or a `.pt`.
        prefix: what every stored name starts with, before the names of the table.
        transforms: by canonical template; their `invert` is used.
        ties: stored names that share the storage of another stored name.
        buffers: stored tensors that are no weights.
    """

    documents: Mapping[str, Mapping[str, Any]]
    names: Mapping[str, str]
    weights_file: str = "model.safetensors"
    prefix: str = ""
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    buffers: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class FormatSpec:
    """A checkpoint format.

    Attributes:
        name: as in `--from NAME`.
        looked_for: what tells the format, for the error that lists the formats.
        detect: whether the files are of this format; looks at names and small files only.
        read: the configuration and the name table; reads no tensor data but small buffers.
        write: the same the other way, best effort: what is written is read back before a tensor is; None where a
            format cannot be written.
    """

    name: str
    looked_for: str
    detect: Callable[[CheckpointFiles], bool]
    read: Callable[[CheckpointFiles], Reading]
    write: Callable[[RetNetConfig], Writing] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: every tensor named, placed and of the right shape, none of them read yet.

    Attributes:
        format: name and release, such as "torchscale (since October 2023)".
        weights: canonical names; `read` holds one tensor in memory.
        source_files: all files that make the model, for provenance.
        tokenizer_files: tokenizer and generation files beside them.
        notes: what the user should know about how it was read.
        card_files: model card and licences beside them.
        settings: config.json beside them, as it stands there; empty where there is none.
    """

    path: Path
    format: str
    config: RetNetConfig
    weights: WeightSource
    source_files: list[Path]
    tokenizer_files: list[Path]
    notes: list[str]
    card_files: list[Path] = field(default_factory=list)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Entry:
    parts: tuple[str, ...]
    transform: Transform


class MappedWeights:
    """The stored tensors under their canonical names.

    Checked at construction, from names and shapes alone. Memory of `read`: the tensor, and its stored parts while a
    transform runs.

    Raises:
        InputError: a stored tensor that the table does not name, a canonical tensor that nothing fills (with the name
            expected in the file), a wrong shape, a tensor that is not floating point.
    """

    def __init__(self, stored: StoredTensors, reading: Reading) -> None:
        self._stored = stored
        check_layer_count(reading.config, stored)
        shapes = canonical_shapes(reading.config)
        sources = expand_names(reading.config, reading.names, reading.prefix)
        places = {name: canonical for name, canonical, _ in sources}
        dropped = _dropped_names(reading)
        present = set(stored.names())
        for name in stored.names():
            if name not in dropped and places.get(name) not in shapes:
                raise InputError(f"unknown tensor {name!r}", f"the names of {reading.version}", _hint(places.get(name)))
        parts: dict[str, list[str]] = {}
        templates: dict[str, str] = {}
        for name, canonical, template in sources:
            parts.setdefault(canonical, []).append(name)
            templates[canonical] = template
        self._entries: dict[str, _Entry] = {}
        for canonical, shape in shapes.items():
            transform = reading.transforms.get(templates.get(canonical, ""), AS_STORED)
            names = tuple(parts.get(canonical, ()))
            if not names:
                raise InputError(f"nothing in {reading.version} gives the tensor {canonical!r}", f"shape {list(shape)}")
            for name in names:
                if name not in present:
                    raise InputError(f"no tensor {name!r}", f"it, for {canonical!r}", "the checkpoint is incomplete")
                _check_tensor(name, stored.info(name), transform.stored_shape(shape), canonical)
            self._entries[canonical] = _Entry(names, transform)
        self._shapes = shapes

    def names(self) -> Iterable[str]:
        """Canonical names, in canonical order."""
        return self._entries.keys()

    def info(self, name: str) -> TensorInfo:
        """Canonical shape and stored dtype."""
        return TensorInfo(self._shapes[name], self._stored.info(self._entries[name].parts[0]).dtype)

    def read(self, name: str) -> Array:
        """The canonical tensor, contiguous and owned by the caller."""
        entry = self._entries[name]
        return np.ascontiguousarray(entry.transform.apply([self._stored.read(part) for part in entry.parts]))

    def region(self, name: str) -> FileRegion | None:
        """Where the bytes of a tensor that is taken as stored lie."""
        entry = self._entries[name]
        return self._stored.region(entry.parts[0]) if entry.transform is AS_STORED else None

    def blocks(self, name: str) -> Iterator[Array]:
        """The canonical tensor in pieces of whole rows of about 16 MB, or whole where it is not taken as stored."""
        entry = self._entries[name]
        if entry.transform is AS_STORED:
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


def expand_names(config: RetNetConfig, names: SplitTable, prefix: str) -> list[tuple[str, str, str]]:
    """A name table for this many layers and heads: stored name, canonical name, its template.

    Names that the table drops are left out.
    """
    return [
        (prefix + stored.format(i=i, h=h), template.format(i=i), template)
        for stored, canonical in names.items()
        for i, h in _indices(config, stored)
        for template in ((canonical,) if isinstance(canonical, str) else canonical or ())
    ]


def _dropped_names(reading: Reading) -> set[str]:
    return {
        reading.prefix + stored.format(i=i, h=h)
        for stored, canonical in reading.names.items()
        if canonical is None
        for i, h in _indices(reading.config, stored)
    }


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
