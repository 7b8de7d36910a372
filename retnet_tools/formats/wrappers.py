"""What wrappers put around the names of a state dict, and how it comes off.

Prefixes (`module.`, `_orig_mod.`, `model.`, `net.`, and chains of these) stand before every name: whatever makes a
format's marks fit is the prefix. Those that wrap the blocks inside a model leave their word in the middle. A wrapper
may have the output projection itself, outside of the prefix; and a model may be saved without its own outermost part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from retnet_tools.errors import InputError
from retnet_tools.formats.spec import FormatSpec
from retnet_tools.formats.storage import StoredTensors

INERT_TENSORS = frozenset({"n_averaged"})
"""Counters of torch's averaged models, beside the weights."""
# torch.compile, FSDP (torch's, fairscale's), activation checkpointing, Fabric.
_WORD = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module)\."
)


def renamed(stored: StoredTensors, names: Mapping[str, str]) -> StoredTensors:
    """Tensors under other names: from each name here to the stored one."""
    return StoredTensors({name: stored.locations[old] for name, old in names.items()}, stored.metadata)


def without_words(stored: StoredTensors) -> StoredTensors:
    """The tensors, their names without the words that wrappers put in the middle."""
    names = {_WORD.sub("", name): name for name in stored.names()}
    return renamed(stored, names) if len(names) == len(stored.locations) else stored


def prefixes(names: Iterable[str], marks: Sequence[str]) -> list[str]:
    """Every prefix with which all marks are among the names, the shortest first."""
    known = set(names)
    ends = [name.removesuffix(marks[0]) for name in known if name.endswith(marks[0])]
    found = [p for p in ends if (not p or p.endswith(".")) and all(p + mark in known for mark in marks)]
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def base_prefixes(names: Iterable[str], spec: FormatSpec) -> list[str]:
    """The same of a model that was saved without its outermost part."""
    return prefixes(names, [mark.removeprefix(spec.base) for mark in spec.marks]) if spec.base else []


def unwrapped(stored: StoredTensors, spec: FormatSpec) -> tuple[StoredTensors, str]:
    """The tensors under a format's names, and the prefix that came off.

    Raises:
        InputError: several prefixes that fit, or a name without the one that does.
    """
    found, base = prefixes(stored.names(), spec.marks), ""
    if not found and (found := base_prefixes(stored.names(), spec)):
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
    return renamed(stored, {**names, **heads}), prefix


def _heads(stored: StoredTensors, spec: FormatSpec, prefix: str, base: str) -> dict[str, str]:
    """The parts of an output projection that a wrapper has itself, by the format's name for each."""
    words = prefix.split(".")[:-1]
    places = [".".join((*words[:i], "")) for i in range(len(words) + 1)]
    heads = [(to, place + name) for name, to in spec.outer_head.items() for place in places]
    heads = [(to, name) for to, name in heads if name in stored.locations]
    return {to: name for to, name in heads if base or prefix + to not in stored.locations}
