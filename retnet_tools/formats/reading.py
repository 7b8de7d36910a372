"""Finds out which format a checkpoint is, from its tensors and its configuration together, and what it is to read.

What wrappers put around the names comes off before the format sees one. Prefixes (`module.`, `_orig_mod.`, `model.`,
`net.`, and chains of these) stand before every name: whatever makes a format's marks fit is the prefix. Those that wrap
the blocks inside a model leave their word in the middle. A wrapper may have the output projection itself, outside of
the prefix; and a model may be saved without its own outermost part.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from retnet_tools.errors import InputError
from retnet_tools.formats.content import short_name
from retnet_tools.formats.files import CONFIG_NAMES, CheckpointFiles
from retnet_tools.formats.foreign import refuse_foreign
from retnet_tools.formats.settings import Settings
from retnet_tools.formats.spec import Document, FormatSpec, Source
from retnet_tools.formats.storage import StoredTensors

INERT_TENSORS = frozenset({"n_averaged"})
"""Counters of torch's averaged models, beside the weights."""
# torch.compile, FSDP (torch's, fairscale's), activation checkpointing, Fabric.
_WORD = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module)\."
)


def find_format(files: CheckpointFiles, formats: Sequence[FormatSpec]) -> FormatSpec:
    """The format whose marks and configuration both are there.

    Raises:
        InputError: none, with the nearest and the first thing that differs from it; or several.
    """
    refuse_foreign(files)
    documents, names = _documents(files), _without_words(files.tensors).locations
    told = [spec for spec in formats if not spec.needs_settings or _has_settings(spec, documents)]
    found = [spec for spec in told if _prefixes(names, spec.marks)] or [s for s in told if _base_prefixes(names, s)]
    if len(found) > 1:
        found = [spec for spec in found if _named(spec, _kinds(names)) == 1.0] or found
    if len(found) > 1:
        lengths = [min(map(len, _prefixes(names, spec.marks)), default=0) for spec in found]
        found = [spec for spec, length in zip(found, lengths, strict=True) if length == min(lengths)]
    if len(found) == 1:
        return found[0]
    if found:
        words = [spec.name for spec in found]
        several = f"{files.path.name} could be {' or '.join(words)}"
        raise InputError(several, "one format", f"choose with --from {words[0]}")
    raise _not_found(files.path, names, documents, formats)


def read_source(spec: FormatSpec, files: CheckpointFiles, ignore_keys: Collection[str] = ()) -> Source:
    """What a checkpoint has for this format to read.

    Raises:
        InputError: no configuration where the format needs one, or a key of it that the format does not know.
    """
    stored, prefix = _unwrapped(_without_words(files.tensors), spec)
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
            missing, action = f"no {spec.layout} configuration with {files.path.name}", "put it beside the weights"
            raise InputError(missing, spec.settings_words, f"{action}, or name it with --config")
        return Document()
    if any(document.name in CONFIG_NAMES for document in found):
        found = [document for document in found if document.file is None or document.name in CONFIG_NAMES]
    first, *others = found
    for other in others:
        # A trainer's own record may leave out what a file beside it says.
        partial = (first.file is None) != (other.file is None)
        for key in sorted(spec.keys.read):
            values = first.values.get(key), other.values.get(key)
            if values[0] != values[1] and not (partial and None in values):
                two = f"{first.name} and {other.name} of {files.path.name} differ in {key}"
                raise InputError(two, "one", "name it with --config")
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
        known = spec.keys.read | spec.keys.inert | spec.keys.only.keys() | spec.keys.aliases.keys()
        keyed = max((len(known & doc.values.keys()) / max(1, len(doc.values)) for doc in documents), default=0.0)
        return _named(spec, kinds) + keyed * _has_settings(spec, documents), keyed

    nearest = max(formats, key=nearness)
    name = short_name(path, 24)
    if nearness(nearest) == (0.0, 0.0):
        return InputError(f"no RetNet of a known layout in {name}", "one of docs/formats.md", "check the path")
    mixed = [
        spec.layout
        for spec in (max(formats, key=lambda s: _named(s, kinds)), nearest)
        if _prefixes(names, spec.marks) or _has_settings(spec, documents)
    ]
    if len(set(mixed)) == 2:
        both = f"{name} has tensors of {mixed[0]}, a configuration of {mixed[1]}"
        return InputError(both, "one layout", "see --config")
    near = f"{name} is no known layout; the nearest is {nearest.layout}"
    missing = next((mark for mark in nearest.marks if not _prefixes(names, (mark,))), None)
    if missing is not None:
        return InputError(near, f"the tensor {missing!r}", "see docs/formats.md")
    return InputError(near, f"a configuration with {nearest.settings_words}", "name it: --config FILE")


def _renamed(stored: StoredTensors, names: Mapping[str, str]) -> StoredTensors:
    """Tensors under other names: from each name here to the stored one."""
    return StoredTensors({name: stored.locations[old] for name, old in names.items()}, stored.metadata)


def _without_words(stored: StoredTensors) -> StoredTensors:
    """The tensors, their names without the words that wrappers put in the middle."""
    names = {_WORD.sub("", name): name for name in stored.names()}
    return _renamed(stored, names) if len(names) == len(stored.locations) else stored


def _prefixes(names: Iterable[str], marks: Sequence[str]) -> list[str]:
    """Every prefix with which all marks are among the names, the shortest first."""
    known = set(names)
    ends = [name.removesuffix(marks[0]) for name in known if name.endswith(marks[0])]
    found = [p for p in ends if (not p or p.endswith(".")) and all(p + mark in known for mark in marks)]
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _base_prefixes(names: Iterable[str], spec: FormatSpec) -> list[str]:
    """The same of a model that was saved without its outermost part."""
    return _prefixes(names, [mark.removeprefix(spec.base) for mark in spec.marks]) if spec.base else []


def _unwrapped(stored: StoredTensors, spec: FormatSpec) -> tuple[StoredTensors, str]:
    """The tensors under a format's names, and the prefix that came off.

    Raises:
        InputError: several prefixes that fit, or a name without the one that does.
    """
    found, base = _prefixes(stored.names(), spec.marks), ""
    if not found and (found := _base_prefixes(stored.names(), spec)):
        base = spec.base
    if len(found) > 1:
        raise InputError(f"weights under {' and '.join(map(repr, found))}", f"one {spec.layout}", "save one of them")
    prefix = found[0] if found else ""  # without any the format says what it misses
    heads = _heads(stored, spec, prefix, base)
    names = {base + name.removeprefix(prefix): name for name in stored.names() if name.startswith(prefix)}
    for name in heads.values():
        names.pop(base + name.removeprefix(prefix), None)
    for name in stored.names():
        if not name.startswith(prefix) and name not in INERT_TENSORS and name not in heads.values():
            raise InputError(f"unknown tensor {name!r}", f"names that start with {prefix!r}", "remove it")
    for name in INERT_TENSORS:
        names.pop(base + name, None)
    return _renamed(stored, {**names, **heads}), prefix


def _heads(stored: StoredTensors, spec: FormatSpec, prefix: str, base: str) -> dict[str, str]:
    """The parts of an output projection that a wrapper has itself, by the format's name for each."""
    words = prefix.split(".")[:-1]
    places = [".".join((*words[:i], "")) for i in range(len(words) + 1)]
    heads = [(to, place + name) for name, to in spec.outer_head.items() for place in places]
    heads = [(to, name) for to, name in heads if name in stored.locations]
    return {to: name for to, name in heads if base or prefix + to not in stored.locations}
