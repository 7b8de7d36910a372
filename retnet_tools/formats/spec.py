"""A checkpoint format as data, and the checkpoint that reading one gives.

A format is one frozen `FormatSpec` in one file. Its `read` resolves the format's own configuration to a `Reading`:
the `RetNetConfig`, and a table from the names that the format stores to the canonical ones.

    NAMES = {
        "embed_tokens.weight": "embedding.weight",
        "layers.{i}.ffn.fc1.weight": "layers.{i}.ffn.gate_proj.weight",
        "layers.{i}.retentions.{h}.W_Q": "layers.{i}.retention.q_proj.weight",   # all heads make one tensor
        "retnet_rel_pos.angle": None,                                            # dropped on purpose
    }

`{i}` runs over layers and `{h}` over heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import InputError
from retnet_tools.formats.files import CheckpointFiles
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.weights import Array, TensorInfo, WeightSource, canonical_shapes, is_floating

Shape = tuple[int, ...]
NameTable = Mapping[str, str | None]


@dataclass(frozen=True)
class Transform:
    """How the stored tensors of one canonical tensor become it.

    Attributes:
        stored_shape: shape of each stored part, from the canonical shape.
        apply: the canonical tensor, from the stored parts in the order of `{h}`.
    """

    stored_shape: Callable[[Shape], Shape]
    apply: Callable[[Sequence[Array]], Array]


AS_STORED = Transform(lambda shape: shape, lambda parts: parts[0])


@dataclass(frozen=True)
class Reading:
    """A format's configuration, resolved.

    Attributes:
        version: which release of the format, for people.
        names: from stored to canonical names, as templates; None drops a tensor on purpose.
        prefix: what every stored name starts with, before the names of the table.
        transforms: by canonical template; tensors without one are taken as stored.
        config_files: the files that the configuration was read from.
        notes: what the user should know about the reading.
    """

    config: RetNetConfig
    version: str
    names: NameTable
    prefix: str = ""
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    config_files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FormatSpec:
    """A checkpoint format.

    Attributes:
        name: as in `--from NAME`.
        looked_for: what tells the format, for the error that lists the formats.
        detect: whether the files are of this format; looks at names and small files only.
        read: the configuration and the name table; reads no tensor data.
    """

    name: str
    looked_for: str
    detect: Callable[[CheckpointFiles], bool]
    read: Callable[[CheckpointFiles], Reading]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: every tensor named, placed and of the right shape, none of them read yet.

    Attributes:
        format: name and release, such as "torchscale (since October 2023)".
        weights: canonical names; `read` holds one tensor in memory.
        source_files: all files that make the model, for provenance.
        tokenizer_files: tokenizer and generation files beside them.
        notes: what the user should know about how it was read.
    """

    path: Path
    format: str
    config: RetNetConfig
    weights: WeightSource
    source_files: list[Path]
    tokenizer_files: list[Path]
    notes: list[str]


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
        sources, dropped = _expand(reading)
        present = set(stored.names())
        for name in stored.names():
            if name not in dropped and sources.get(name, ("", ""))[0] not in shapes:
                raise InputError(f"unknown tensor {name!r}", f"the names of {reading.version}", _hint(name, sources))
        parts: dict[str, list[str]] = {}
        templates: dict[str, str] = {}
        for name, (canonical, template) in sources.items():
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


def _expand(reading: Reading) -> tuple[dict[str, tuple[str, str]], set[str]]:
    """The table for this many layers and heads: stored name to (canonical name, its template), and dropped names."""
    sources: dict[str, tuple[str, str]] = {}
    dropped: set[str] = set()
    for stored, canonical in reading.names.items():
        layers = range(reading.config.num_layers if "{i}" in stored else 1)
        heads = range(reading.config.num_heads if "{h}" in stored else 1)
        for i in layers:
            for h in heads:
                name = reading.prefix + stored.format(i=i, h=h)
                if canonical is None:
                    dropped.add(name)
                else:
                    sources[name] = (canonical.format(i=i), canonical)
    return sources, dropped


def _hint(name: str, sources: Mapping[str, tuple[str, str]]) -> str:
    if name in sources:
        return f"the configuration has no place for {sources[name][0]!r}: check that it belongs to these weights"
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
