"""Finds out which format a checkpoint is, from its tensors and its configuration together, and reads it as that.

What wrappers put around the names comes off before the format sees one (see `wrappers`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retnet_tools.errors import InputError
from retnet_tools.formats.content import short_name
from retnet_tools.formats.files import CONFIG_NAMES, CheckpointFiles
from retnet_tools.formats.foreign import refuse_foreign
from retnet_tools.formats.settings import Settings
from retnet_tools.formats.spec import FormatSpec, Reading, Source
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.formats.wrappers import base_prefixes, prefixes, unwrapped, without_words


@dataclass(frozen=True)
class OpenedSource:
    """A format's reading, and what it read.

    Attributes:
        stored: the tensors under the format's names.
        prefix: what the file puts before them.
        settings: the configuration that was read.
        config_file: its file; None where it lies in the file of weights, or there is none.
    """

    reading: Reading
    stored: StoredTensors
    prefix: str
    settings: Mapping[str, Any]
    config_file: Path | None


def find_format(files: CheckpointFiles, formats: Sequence[FormatSpec]) -> FormatSpec:
    """The format whose marks and configuration both are there.

    Raises:
        InputError: none, with the nearest and the first thing that differs from it; or several.
    """
    refuse_foreign(files)
    documents, names = list(_documents(files)), without_words(files.tensors).locations
    told = [spec for spec in formats if _fits(spec, documents)]
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


def read_as(spec: FormatSpec, files: CheckpointFiles, ignore_keys: Collection[str] = ()) -> OpenedSource:
    """Read a checkpoint as one of this format.

    Args:
        ignore_keys: configuration keys that the user answers for.

    Raises:
        InputError: no configuration where the format needs one, and whatever the format refuses.
    """
    stored, prefix = unwrapped(without_words(files.tensors), spec)
    path, name, document = _choose_document(spec, files)
    settings = Settings.declared(spec.layout, document, spec.keys, ignore_keys)
    reading = spec.read(Source(stored, settings, name))
    reading = replace(reading, notes=(*reading.notes, *settings.notes()))
    return OpenedSource(reading, stored, prefix, document, path)


def _documents(files: CheckpointFiles) -> Iterator[tuple[Path | None, str, dict[str, Any]]]:
    """What may be a configuration: its file if it has one, what to call it, and itself."""
    for name, document in files.embedded.items():
        yield None, name or "the file's own entries", document
    for path, document in files.configs.items():
        yield path, path.name, document


def _fits(spec: FormatSpec, documents: Iterable[tuple[Path | None, str, dict[str, Any]]]) -> bool:
    return not spec.needs_settings or any(spec.is_settings(document) for _, _, document in documents)


def _kinds(names: Iterable[str]) -> set[str]:
    """Names without their numbers, which layers and heads share."""
    return {re.sub(r"\d+", "{}", name) for name in names}


def _named(spec: FormatSpec, kinds: Collection[str]) -> float:
    """The part of the names that are a format's, behind whatever prefix."""
    templates = {re.sub(r"\{[ih]\}|\d+", "{}", name) for name in spec.names}
    return sum(any(k == t or k.endswith("." + t) for t in templates) for k in kinds) / max(1, len(kinds))


def _choose_document(spec: FormatSpec, files: CheckpointFiles) -> tuple[Path | None, str, dict[str, Any]]:
    """A format's configuration: its file, what to call it, and itself, of a record in the file of weights and a file
    beside it together."""
    documents = list(_documents(files))
    found = [entry for entry in documents if spec.is_settings(entry[2])]
    if not found and len(files.configs) == 1 and not files.embedded and spec.needs_settings:
        found = documents  # the format says what it misses
    if not found:
        if spec.needs_settings:
            raise InputError(
                f"no {spec.layout} configuration with {files.path.name}",
                spec.settings_words,
                "put it beside the weights, or name it with --config",
            )
        return None, "", {}
    if any(name in CONFIG_NAMES for _, name, _ in found):
        found = [entry for entry in found if entry[0] is None or entry[1] in CONFIG_NAMES]
    path, name, document = found[0]
    for other_path, other_name, other in found[1:]:
        # A trainer's own record may leave out what a file beside it says.
        partial = (path is None) != (other_path is None)
        for key in sorted(spec.keys.read):
            values = document.get(key), other.get(key)
            if values[0] != values[1] and not (partial and None in values):
                raise InputError(
                    f"{name} and {other_name} of {files.path.name} differ in {key}", "one", "name it with --config"
                )
    for other_path, _, other in found[1:]:
        if path is None and other_path is not None:
            path = other_path
            document = {**other, **{k: v for k, v in document.items() if v is not None or k not in other}}
    return path, name, document


def _not_found(
    path: Path,
    names: Collection[str],
    documents: Sequence[tuple[Path | None, str, dict[str, Any]]],
    formats: Sequence[FormatSpec],
) -> InputError:
    """The error that names the nearest format, and what differs from it first."""
    kinds = _kinds(names)

    def nearness(spec: FormatSpec) -> tuple[float, float]:
        named = _named(spec, kinds)
        keyed = max((len(spec.keys.known & doc.keys()) / max(1, len(doc)) for _, _, doc in documents), default=0.0)
        return named + keyed * any(spec.is_settings(doc) for _, _, doc in documents), keyed

    nearest = max(formats, key=nearness)
    name = short_name(path, 24)
    if nearness(nearest) == (0.0, 0.0):
        return InputError(f"no RetNet of a known layout in {name}", "one of docs/formats.md", "check the path")
    mixed = [
        spec.layout
        for spec in (max(formats, key=lambda s: _named(s, kinds)), nearest)
        if prefixes(names, spec.marks) or any(spec.is_settings(doc) for _, _, doc in documents)
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
