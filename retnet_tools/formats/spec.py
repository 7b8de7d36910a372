"""A checkpoint format as data, and the checkpoint that reading one gives.

A format is one frozen `FormatSpec` in one file. Its `read` resolves the format's own configuration to a `Reading`:
the `RetNetConfig`, and a table from the names that the format stores to the canonical ones. Wrappers' prefixes
(`module.`, `model.`, ...) are gone from the names that it meets.

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

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from retnet_tools.config import RetNetConfig
from retnet_tools.formats.settings import Keys, Settings
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.weights import Array, WeightSource

CONFIG_FILE, SAFETENSORS_FILE, TORCH_FILE = "config.json", "model.safetensors", "model.pt"
Shape = tuple[int, ...]
Modules = Mapping[str, Sequence[str]]
NameTable = Mapping[str, str | tuple[str, ...] | None]


@dataclass(frozen=True)
class Transform:
    """How the stored tensors of one canonical tensor become it.

    Attributes:
        stored_shape: of each stored part, from the canonical shape.
        apply: the canonical tensor, from the stored parts in the order of `{h}`.
        invert: the one stored tensor from the canonical one, for formats that are written.
    """

    stored_shape: Callable[[Shape], Shape]
    apply: Callable[[Sequence[Array]], Array]
    invert: Callable[[Array], Array] = lambda canonical: canonical


AS_STORED = Transform(lambda shape: shape, lambda parts: parts[0])


def in_layers(prefix: str, modules: Modules) -> dict[str, Sequence[str]]:
    """The modules of one layer by their whole names, where those of all layers begin with a prefix and the number."""
    return {f"{prefix}.{{i}}.{name}": _each(to, lambda one: f"layers.{{i}}.{one}") for name, to in modules.items()}


def module_names(modules: Modules) -> NameTable:
    """The name table of modules by their stored and canonical names, one or several: of all weights, then biases."""
    weights = {f"{name}.weight": _each(to, lambda one: f"{one}.weight") for name, to in modules.items()}
    return weights | {f"{name}.bias": _each(to, lambda one: f"{one}.bias") for name, to in modules.items()}


def _each(names: Sequence[str], change: Callable[[str], str]) -> str | tuple[str, ...]:
    return change(names) if isinstance(names, str) else tuple(map(change, names))


@dataclass(frozen=True)
class Reading:
    """A format's configuration, resolved.

    Attributes:
        version: which release of the format, for people.
        names: from stored to canonical names, as templates; None drops a tensor on purpose, a tuple splits it. Where
            the configuration ties the output projection, a stored one must be the embedding, and is dropped.
        transforms: by canonical template; tensors without one are taken as stored.
        zeros: canonical templates of tensors that the format does not have because they are zero.
        assumed_clamp: whether nothing stored tells which clamp of the scores the model was trained with, and the one
            in `config` is assumed.
    """

    config: RetNetConfig
    version: str
    names: NameTable
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    zeros: frozenset[str] = frozenset()
    assumed_clamp: bool = False


@dataclass(frozen=True)
class Writing:
    """A model as a format stores it.

    Attributes:
        settings: the JSON of its configuration, in `settings_file`.
        names: as in `Reading`, of which the names of tensors that the model has are written.
        weights_file: `model.safetensors`, which may become shards, or a `.pt`.
        transforms: by canonical template; their `invert` is used.
        ties: stored names that share the storage of another stored name.
        buffers: stored tensors that are no weights.
    """

    settings: Mapping[str, Any]
    names: NameTable
    settings_file: str = CONFIG_FILE
    weights_file: str = SAFETENSORS_FILE
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    buffers: Mapping[str, Array] = field(default_factory=dict)


class Document(NamedTuple):
    """What may be a configuration, as it is stored.

    Attributes:
        file: None where it lies in the file of weights, or there is none.
        name: of its file, or of its entry in the file of weights ("cfg.model").
    """

    file: Path | None = None
    name: str = ""
    values: Mapping[str, Any] = MappingProxyType({})


NO_DOCUMENT = Document()


@dataclass(frozen=True)
class Source:
    """What a format reads.

    Attributes:
        stored: the tensors, under their names without what wrappers put before them.
        settings: the format's configuration, every key of it explained; empty where there is none.
        prefix: what the file puts before the names.
        notes: what the user should know, to which a format's `read` adds.
    """

    stored: StoredTensors
    settings: Settings
    document: Document = NO_DOCUMENT
    prefix: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FormatSpec:
    """A checkpoint format.

    Attributes:
        name: as in `--from NAME`; `layout` is what people call it.
        keys: what its configuration may hold.
        is_settings: whether a document is its configuration.
        settings_words: what tells such a document, for errors.
        marks: stored names that tell it, without wrappers' prefixes; all must be there.
        names: every name that it may store, as templates.
        read: the configuration and the name table; reads no tensor data but small buffers.
        base: what its names begin with that a model saved without its head leaves out ("model.").
        outer_head: from names of an output projection that a wrapper has outside of its prefix to the format's.
        needs_settings: whether it cannot be read without a configuration.
        write: the same the other way, of a configuration whose clamp is assumed or not, where a format can be written.
            Best effort: what is planned is read back before a tensor is written.
    """

    name: str
    layout: str
    keys: Keys
    is_settings: Callable[[Mapping[str, Any]], bool]
    settings_words: str
    marks: tuple[str, ...]
    names: Collection[str]
    read: Callable[[Source], Reading]
    base: str = ""
    outer_head: Mapping[str, str] = field(default_factory=dict)
    needs_settings: bool = True
    write: Callable[[RetNetConfig, bool], Writing] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: every tensor named, placed and of the right shape, none of them read yet.

    Attributes:
        format: name and release, such as "torchscale (since October 2023)".
        weights: canonical names; `read` holds one tensor in memory.
        source_files: all files that make the model, for provenance.
        tokenizer_files, card_files: those of tokenizer and generation, of model card and licences.
        notes: what the user should know about how it was read.
        settings: the stored configuration, by its own names.
        assumed_clamp: whether the clamp of the scores in `config` is assumed (`Reading.assumed_clamp`).
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
    assumed_clamp: bool = False
