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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retnet_tools.config import RetNetConfig
from retnet_tools.formats.settings import Keys, Settings
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.weights import Array, WeightSource

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
        transforms: by canonical template; tensors without one are taken as stored.
        zeros: canonical templates of tensors that the format does not have because they are zero.
        notes: what the user should know about the reading.
        assumed_clamp: whether nothing stored tells which clamp of the scores the model was trained with, and the one
            in `config` is assumed.
    """

    config: RetNetConfig
    version: str
    names: SplitTable
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    zeros: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    assumed_clamp: bool = False


@dataclass(frozen=True)
class Writing:
    """A model as a format stores it.

    Attributes:
        documents: file name to JSON, the configuration last.
        names: from stored to canonical names, as templates.
        weights_file: `model.safetensors`, which may become shards, or a `.pt`.
        transforms: by canonical template; their `invert` is used.
        ties: stored names that share the storage of another stored name.
        buffers: stored tensors that are no weights.
    """

    documents: Mapping[str, Mapping[str, Any]]
    names: Mapping[str, str]
    weights_file: str = "model.safetensors"
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    buffers: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """What a format reads.

    Attributes:
        stored: the tensors, under their names without what wrappers put before them.
        settings: the format's configuration, every key of it explained; empty where there is none.
        settings_name: of its file, or of its entry in the file of weights ("cfg.model"); empty where there is none.
    """

    stored: StoredTensors
    settings: Settings
    settings_name: str = ""


@dataclass(frozen=True)
class FormatSpec:
    """A checkpoint format.

    Attributes:
        name: as in `--from NAME`.
        layout: what people call it.
        keys: what its configuration may hold.
        is_settings: whether a document is its configuration.
        settings_words: what tells such a document, for errors.
        marks: stored names that tell it, without wrappers' prefixes; all must be there.
        names: every name that it may store, as templates.
        read: the configuration and the name table; reads no tensor data but small buffers.
        base: what its names begin with that a model saved without its head leaves out ("model.").
        outer_head: from the names of an output projection that a wrapper has itself, outside of its prefix, to those
            that the format has.
        needs_settings: whether it cannot be read without a configuration.
        write: the same the other way, of a configuration whose clamp is assumed or not; best effort: what is written is
            read back before a tensor is; None where a format cannot be written.
    """

    name: str
    layout: str
    keys: Keys
    is_settings: Callable[[Mapping[str, Any]], bool]
    settings_words: str
    marks: tuple[str, ...]
    names: Sequence[str]
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
        tokenizer_files: tokenizer and generation files beside them.
        notes: what the user should know about how it was read.
        card_files: model card and licences beside them.
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
