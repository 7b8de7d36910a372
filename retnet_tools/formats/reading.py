"""Finds out which format a checkpoint is, from its tensors and its configuration together, and reads it as that.

Wrappers put prefixes before every name (`module.`, `_orig_mod.`, `model.`, `net.`, and chains of these): whatever makes
a format's marks fit is the prefix, and comes off before the format sees a name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retnet_tools.errors import InputError
from retnet_tools.formats.files import CheckpointFiles
from retnet_tools.formats.foreign import refuse_foreign
from retnet_tools.formats.settings import Settings
from retnet_tools.formats.spec import FormatSpec, Reading, Source
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.weights import Array, FileRegion

INERT_TENSORS = frozenset({"n_averaged"})
"""Counters of torch's averaged models, beside the weights."""


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
    documents, names = list(_documents(files)), files.tensors.locations
    found = [spec for spec in formats if _fits(spec, documents) and _prefixes(names, spec.marks)]
    if len(found) > 1:
        found = [spec for spec in found if _named(spec, _kinds(names)) == 1.0] or found
    if len(found) == 1:
        return found[0]
    if found:
        words = [spec.name for spec in found]
        raise InputError(
            f"{files.path.name} could be {' or '.join(words)}", "one format", f"choose with --from {words[0]}"
        )
    raise _not_found(files, documents, formats)


def read_as(spec: FormatSpec, files: CheckpointFiles, ignore_keys: Collection[str] = ()) -> OpenedSource:
    """Read a checkpoint as one of this format.

    Args:
        ignore_keys: configuration keys that the user answers for.

    Raises:
        InputError: no configuration where the format needs one, and whatever the format refuses.
    """
    prefix = _choose_prefix(files.tensors, spec)
    stored = Unwrapped(files.tensors, prefix)
    path, name, document = _choose_document(spec, files)
    settings = Settings.declared(spec.layout, document, spec.keys, ignore_keys)
    reading = spec.read(Source(stored, settings, name))
    reading = replace(reading, notes=(*reading.notes, *settings.without_effect()))
    return OpenedSource(reading, stored, prefix, document, path)


class Unwrapped(StoredTensors):
    """The tensors whose names start with a prefix, without it, and without counters."""

    def __init__(self, stored: StoredTensors, prefix: str) -> None:
        found = {n.removeprefix(prefix): place for n, place in stored.locations.items() if n.startswith(prefix)}
        super().__init__({name: place for name, place in found.items() if name not in INERT_TENSORS}, stored.metadata)
        self._stored, self._prefix = stored, prefix

    def read(self, name: str) -> Array:
        """The tensor's data, contiguous and owned by the caller."""
        return self._stored.read(self._prefix + name)

    def blocks(self, name: str) -> Iterator[Array]:
        """The tensor in pieces of whole rows of about 16 MB."""
        return self._stored.blocks(self._prefix + name)

    def region(self, name: str) -> FileRegion | None:
        """Where a contiguous tensor's bytes lie."""
        return self._stored.region(self._prefix + name)

    def same_data(self, first: str, second: str) -> bool:
        """Whether two tensors share their storage or are equal byte for byte."""
        return self._stored.same_data(self._prefix + first, self._prefix + second)


def _documents(files: CheckpointFiles) -> Iterator[tuple[Path | None, str, dict[str, Any]]]:
    """What may be a configuration: its file if it has one, what to call it, and itself."""
    for name, document in files.embedded.items():
        yield None, name or "the file's own entries", document
    for path, document in files.configs.items():
        yield path, path.name, document


def _fits(spec: FormatSpec, documents: Iterable[tuple[Path | None, str, dict[str, Any]]]) -> bool:
    return not spec.needs_settings or any(spec.is_settings(document) for _, _, document in documents)


def _prefixes(names: Iterable[str], marks: Sequence[str]) -> list[str]:
    """Every prefix with which all marks are among the names, the shortest first."""
    known = set(names)
    ends = [name.removesuffix(marks[0]) for name in known if name.endswith(marks[0])]
    found = [p for p in ends if (not p or p.endswith(".")) and all(p + mark in known for mark in marks)]
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _kinds(names: Iterable[str]) -> set[str]:
    """Names without their numbers, which layers and heads share."""
    return {re.sub(r"\d+", "{}", name) for name in names}


def _named(spec: FormatSpec, kinds: Collection[str]) -> float:
    """The part of the names that are a format's, behind whatever prefix."""
    templates = {re.sub(r"\{[ih]\}|\d+", "{}", name) for name in spec.names}
    return sum(any(k == t or k.endswith("." + t) for t in templates) for k in kinds) / max(1, len(kinds))


def _choose_prefix(stored: StoredTensors, spec: FormatSpec) -> str:
    prefixes = _prefixes(stored.names(), spec.marks)
    if len(prefixes) > 1:
        raise InputError(f"weights under {' and '.join(map(repr, prefixes))}", f"one {spec.layout}", "save one of them")
    prefix = prefixes[0] if prefixes else ""  # without any the format says what it misses
    for name in stored.names():
        if not name.startswith(prefix) and name not in INERT_TENSORS:
            raise InputError(f"unknown tensor {name!r}", f"names that start with {prefix!r}", "remove it")
    return prefix


def _choose_document(spec: FormatSpec, files: CheckpointFiles) -> tuple[Path | None, str, dict[str, Any]]:
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
    path, name, document = found[0]
    for other_path, other_name, other in found[1:]:
        # A trainer's own record may leave out what a file beside it says.
        beside = (found[0][0] is None) != (other_path is None)
        for key in sorted(spec.keys.read & (document.keys() & other.keys() if beside else spec.keys.read)):
            if document.get(key) != other.get(key):
                raise InputError(
                    f"{name} and {other_name} of {files.path.name} differ in {key}", "one", "name it with --config"
                )
        if beside:
            path, document = path or other_path, {**other, **document}
    return path, name, document


def _not_found(
    files: CheckpointFiles, documents: Sequence[tuple[Path | None, str, dict[str, Any]]], formats: Sequence[FormatSpec]
) -> InputError:
    """The error that names the nearest format, and what differs from it first."""
    kinds = _kinds(files.tensors.locations)

    def nearness(spec: FormatSpec) -> tuple[float, float]:
        named = _named(spec, kinds)
        keyed = max((len(spec.keys.known & doc.keys()) / max(1, len(doc)) for _, _, doc in documents), default=0.0)
        return named + keyed * any(spec.is_settings(doc) for _, _, doc in documents), keyed

    nearest = max(formats, key=nearness)
    name = files.path.name or str(files.path)
    if nearness(nearest) == (0.0, 0.0):
        return InputError(f"no RetNet of a known layout in {name}", "one of docs/formats.md", "check the path")
    near = f"{name} is no known layout; the nearest is {nearest.layout}"
    missing = next((mark for mark in nearest.marks if not _prefixes(files.tensors.locations, (mark,))), None)
    if missing is not None:
        return InputError(near, f"the tensor {missing!r}", "see docs/formats.md")
    return InputError(near, f"a configuration with {nearest.settings_words}", "name it with --config FILE")
