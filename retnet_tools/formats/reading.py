"""Finds out which format a checkpoint is, from its tensors and its configuration together, and what it is to read.

What wrappers put around the names comes off before the format sees one (see `wrappers`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from retnet_tools.errors import InputError
from retnet_tools.formats.content import short_name
from retnet_tools.formats.files import CONFIG_NAMES, CheckpointFiles
from retnet_tools.formats.foreign import refuse_foreign
from retnet_tools.formats.settings import Settings
from retnet_tools.formats.spec import NO_DOCUMENT, Document, FormatSpec, Source
from retnet_tools.formats.wrappers import base_prefixes, prefixes, unwrapped, without_words


def find_format(files: CheckpointFiles, formats: Sequence[FormatSpec]) -> FormatSpec:
    """The format whose marks and configuration both are there.

    Raises:
        InputError: none, with the nearest and the first thing that differs from it; or several.
    """
    refuse_foreign(files)
    documents, names = _documents(files), without_words(files.tensors).locations
    told = [spec for spec in formats if not spec.needs_settings or _has_settings(spec, documents)]
    found = [spec for spec in told if prefixes(names, spec.marks)] or [s for s in told if base_prefixes(names, s)]
    if len(found) > 1:
        found = [spec for spec in found if _named(spec, _kinds(names)) == 1.0] or found
    if len(found) > 1:
        lengths = [min(map(len, prefixes(names, spec.marks)), default=0) for spec in found]
        found = [spec for spec, length in zip(found, lengths, strict=True) if length == min(lengths)]
    if len(found) == 1:
        return found[0]
    if found:
        words = [spec.name for spec in found]
        raise InputError(
            f"{files.path.name} could be {' or '.join(words)}", "one format", f"choose with --from {words[0]}"
        )
    raise _not_found(files.path, names, documents, formats)


def read_source(spec: FormatSpec, files: CheckpointFiles, ignore_keys: Collection[str] = ()) -> Source:
    """What a checkpoint has for this format to read.

    Args:
        ignore_keys: configuration keys that the user answers for.

    Raises:
        InputError: no configuration where the format needs one, or a key of it that the format does not know.
    """
    stored, prefix = unwrapped(without_words(files.tensors), spec)
    document = _choose_document(spec, files)
    return Source(stored, Settings.declared(spec.layout, document.values, spec.keys, ignore_keys), document, prefix)


def _documents(files: CheckpointFiles) -> list[Document]:
    """What may be a configuration."""
    embedded = [Document(None, name or "the file's own entries", values) for name, values in files.embedded.items()]
    return embedded + [Document(path, path.name, values) for path, values in files.configs.items()]


def _has_settings(spec: FormatSpec, documents: Iterable[Document]) -> bool:
    return any(spec.is_settings(document.values) for document in documents)


def _kinds(names: Iterable[str]) -> set[str]:
    """Names without their numbers, which layers and heads share."""
    return {re.sub(r"\d+", "{}", name) for name in names}


def _named(spec: FormatSpec, kinds: Collection[str]) -> float:
    """The part of the names that are a format's, behind whatever prefix."""
    templates = {re.sub(r"\{[ih]\}|\d+", "{}", name) for name in spec.names}
    return sum(any(k == t or k.endswith("." + t) for t in templates) for k in kinds) / max(1, len(kinds))


def _choose_document(spec: FormatSpec, files: CheckpointFiles) -> Document:
    """A format's configuration, of a record in the file of weights and a file beside it together."""
    documents = _documents(files)
    found = [document for document in documents if spec.is_settings(document.values)]
    if not found and len(files.configs) == 1 and not files.embedded and spec.needs_settings:
        found = documents  # the format says what it misses
    if not found:
        if spec.needs_settings:
            raise InputError(
                f"no {spec.layout} configuration with {files.path.name}",
                spec.settings_words,
                "put it beside the weights, or name it with --config",
            )
        return NO_DOCUMENT
    if any(document.name in CONFIG_NAMES for document in found):
        found = [document for document in found if document.file is None or document.name in CONFIG_NAMES]
    first, *others = found
    for other in others:
        # A trainer's own record may leave out what a file beside it says.
        partial = (first.file is None) != (other.file is None)
        for key in sorted(spec.keys.read):
            values = first.values.get(key), other.values.get(key)
            if values[0] != values[1] and not (partial and None in values):
                raise InputError(
                    f"{first.name} and {other.name} of {files.path.name} differ in {key}",
                    "one",
                    "name it with --config",
                )
    beside = next((other for other in others if first.file is None and other.file is not None), None)
    if beside is None:
        return first
    stated = {k: v for k, v in first.values.items() if v is not None or k not in beside.values}
    return Document(beside.file, first.name, {**beside.values, **stated})


def _not_found(
    path: Path, names: Collection[str], documents: Sequence[Document], formats: Sequence[FormatSpec]
) -> InputError:
    """The error that names the nearest format, and what differs from it first."""
    kinds = _kinds(names)

    def nearness(spec: FormatSpec) -> tuple[float, float]:
        known = [len(spec.keys.known & document.values.keys()) / max(1, len(document.values)) for document in documents]
        keyed = max(known, default=0.0)
        return _named(spec, kinds) + keyed * _has_settings(spec, documents), keyed

    nearest = max(formats, key=nearness)
    name = short_name(path, 24)
    if nearness(nearest) == (0.0, 0.0):
        return InputError(f"no RetNet of a known layout in {name}", "one of docs/formats.md", "check the path")
    mixed = [
        spec.layout
        for spec in (max(formats, key=lambda s: _named(s, kinds)), nearest)
        if prefixes(names, spec.marks) or _has_settings(spec, documents)
    ]
    if len(set(mixed)) == 2:
        return InputError(
            f"{name} has tensors of {mixed[0]}, a configuration of {mixed[1]}", "one layout", "see --config"
        )
    near = f"{name} is no known layout; the nearest is {nearest.layout}"
    missing = next((mark for mark in nearest.marks if not prefixes(names, (mark,))), None)
    if missing is not None:
        return InputError(near, f"the tensor {missing!r}", "see docs/formats.md")
    return InputError(near, f"a configuration with {nearest.settings_words}", "name it: --config FILE")
