"""Which part of a file is the state dict, and what else lies beside it.

The state dict is the one mapping from names to tensors, at most four keys deep, beside optimizers, schedulers and
random states, which their keys tell. A copy that a key calls an average (EMA) counts where there is no other. All else
that is plain may be a configuration.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from retnet_tools.errors import InputError, UsageError, did_you_mean
from retnet_tools.formats.stand_ins import Global, Shell, StrangeTensor, is_tensor

MAX_DEPTH = 4
MAX_ENTRIES = 1_000_000
MAX_MODULES = 100_000
MAX_SEQUENCE = 16
MAX_NAME = 256
MAX_NESTING = 32
MAX_PATH = 4096
# torch's AveragedModel stores how many models its average is of.
AVERAGE_COUNT = "n_averaged"
AVERAGE_WORDS = frozenset({"ema", "average", "averaged", "averages", "avg", "shadow", "swa", "polyak"})
_BESIDE = re.compile(
    r"opts?|optims?|optimi[sz].*|adamw?|sgd|lion|lamb|muon|adafactor|adagrad|rmsprop|sched.*|rng|random|grads?|gradients?"
    r"|callbacks?|loops|dataloader|sampler"
)
_NO_SETTINGS = re.compile(r".*(optim|rng|random|callbacks).*", re.IGNORECASE)
_OPTIMIZER_NAMES = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg"})
_LEFT_OUT = object()


@dataclass
class Choice:
    """A state dict, chosen.

    Attributes:
        tensors: its names and what they stand for.
        notes: what the user should know about it.
        embedded: the other mappings and objects of the file by dotted path, plain values only.
    """

    tensors: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)
    embedded: dict[str, dict[str, Any]] = field(default_factory=dict)


def choose_state_dict(tree: Any, file: str, entry: str | None = None) -> Choice:
    """The state dict of a file's tree, the one of this entry where it is named.

    Raises:
        InputError: none, or several and no entry that tells which.
        UsageError: no such entry.
    """
    found, owners = _candidates(tree)
    choice = choose(found, file, entry)
    plain = _PlainValues(owners)
    for path, owner, children in _walk(tree):
        if not _is_sequence(owner) and (values := plain.mapping(children)):
            choice.embedded[".".join(path)] = values
    return choice


def choose(candidates: Mapping[str, Mapping[str, Any]], file: str, entry: str | None = None) -> Choice:
    """One of several sets of tensors by name.

    Raises:
        InputError, UsageError: as `choose_state_dict`.
    """
    if not candidates:
        raise InputError(f"{file} holds no state dict", "names with tensors", "save model.state_dict()")
    averages = [path for path in candidates if AVERAGE_WORDS & _words(path)]
    models = [path for path in candidates if path not in averages]
    if entry is not None and entry not in candidates:
        names = ", ".join(path or "(the whole file)" for path in candidates)
        raise UsageError(f"no entry {entry!r} in {file}", f"one of {names}", did_you_mean(entry, candidates))
    chosen, *others = [entry] if entry is not None else models or averages
    if others:
        names = ", ".join([chosen, *others[:3]]) + (", ..." if len(others) > 3 else "")
        raise InputError(f"{file} holds several sets of weights: {names}", "one", "choose with --entry NAME")
    notes = [
        f"the file also holds {path}, an average of these weights: --entry {path} reads it"
        for path in averages
        if path != chosen
    ]
    if chosen in averages and entry is None:
        notes.append(f"these weights are {chosen}, an average")
    tensors = dict(candidates[chosen])
    if tensors.pop(AVERAGE_COUNT, None) is not None:
        notes.append(f"these weights are an average of a training run's ({AVERAGE_COUNT})")
    return Choice(tensors, notes)


def averages_apart(path: str, tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A state dict of a trainer may hold a model and its average, under names that begin with `ema.` or the like."""
    firsts = {name: name.split(".")[0] for name in tensors}
    averages = {first for first in firsts.values() if AVERAGE_WORDS & _words(first) and first != AVERAGE_COUNT}
    rest = {name: tensor for name, tensor in tensors.items() if firsts[name] not in averages}
    if not averages or not any(map(_is_matrix, rest.values())):
        return {path: dict(tensors)}
    apart = {a: {n: t for n, t in tensors.items() if firsts[n] == a} for a in sorted(averages)}
    return {path: rest, **{f"{path}.{a}".removeprefix("."): names for a, names in apart.items()}}


def is_beside_weights(path: str) -> bool:
    """Whether a key's words are an optimizer's, a scheduler's or the like."""
    return "exp_avg" in path or "train_state" in path or any(_BESIDE.fullmatch(word) for word in _words(path))


def _words(path: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", path)}


def _is_sequence(value: Any) -> bool:
    return type(value) in (list, tuple)


def _is_matrix(tensor: Any) -> bool:
    return isinstance(tensor, StrangeTensor) or len(tensor.shape) > 1


def _candidates(tree: Any) -> tuple[dict[str, dict[str, Any]], set[int]]:
    """The mappings that may be the state dict by path, and the ids of what holds them in the tree."""
    found: dict[str, dict[str, Any]] = {}
    owners: dict[str, int] = {}
    seen = set()
    for path, owner, children in _walk(tree):
        tensors = {k: v for k, v in children.items() if isinstance(k, str) and is_tensor(v)}
        contents = tuple(tensors.items())
        if _is_sequence(owner) or not tensors or not _OPTIMIZER_NAMES.isdisjoint(tensors) or contents in seen:
            continue
        # Tensors among other things are a state dict where they are a model's, under dotted names.
        mixed = len(tensors) < len(children) and not any("." in k and _is_matrix(v) for k, v in contents)
        if mixed or is_beside_weights(".".join(path)):
            continue
        seen.add(contents)
        parts = averages_apart(".".join(path), tensors)
        found |= parts
        owners |= dict.fromkeys(parts, id(owner))
    matrices = {path: names for path, names in found.items() if any(map(_is_matrix, names.values()))}
    found = matrices or found
    return found, {owners[path] for path in found}


def _walk(tree: Any) -> Iterator[tuple[tuple[str, ...], Any, dict[Any, Any]]]:
    """Every mapping, object and short sequence by path, breadth first, each once."""
    queue: deque[tuple[tuple[str, ...], Any]] = deque([((), tree)])
    seen: set[int] = set()
    left = MAX_ENTRIES
    while queue:
        path, value = queue.popleft()
        children = entries(value)
        if children is None and _is_sequence(value) and len(value) <= MAX_SEQUENCE:
            children = {str(i): item for i, item in enumerate(value)}
        if children is None or id(value) in seen:
            continue
        seen.add(id(value))
        left -= len(children)
        if left < 0:
            raise InputError("a file of more than a million entries", "a checkpoint", "save model.state_dict()")
        yield path, value, children
        if len(path) < MAX_DEPTH:
            for name, child in children.items():
                if isinstance(name, str) and len(name) <= MAX_NAME and not _NO_SETTINGS.fullmatch(name):
                    queue.append(((*path, name), child))


def entries(value: Any) -> dict[Any, Any] | None:
    """The entries of a mapping, or the attributes and items of an object; None for anything else.

    OmegaConf's containers are what they contain. A pickled module of torch is its state dict beside its attributes.
    """
    if not isinstance(value, Shell):
        return dict(value) if isinstance(value, Mapping) else None
    found = value.entries()
    if isinstance(found.get("_modules"), dict):
        attributes = {name: part for name, part in found.items() if not str(name).startswith("_")}
        return {**attributes, **_module_state(found)}
    content = found.get("_content")
    return content if isinstance(content, dict) else found


def _module_state(module: Mapping[Any, Any]) -> dict[str, Any]:
    """Names and tensors of a pickled module and of those inside it, as its `state_dict` gives them."""
    state: dict[str, Any] = {}
    waiting = [("", module)]
    for _ in range(MAX_MODULES):
        if not waiting:
            return state
        prefix, module = waiting.pop()
        if len(prefix) > MAX_PATH:
            break
        unsaved = module.get("_non_persistent_buffers_set")
        for kind in ("_parameters", "_buffers"):
            for name, tensor in (entries(module.get(kind)) or {}).items():
                if is_tensor(tensor) and not (isinstance(unsaved, list) and name in unsaved):
                    state[f"{prefix}{name}"] = tensor
        parts = {name: part for name, part in module["_modules"].items() if isinstance(part, Shell)}
        inside = [(f"{prefix}{name}.", part.entries()) for name, part in parts.items()]
        waiting += [part for part in reversed(inside) if isinstance(part[1].get("_modules"), dict)]
    raise InputError("a pickled model of endlessly many modules", "a checkpoint", "save model.state_dict()")


class _PlainValues:
    """Turns parts of one tree into plain values, each part once, however often the tree refers to it.

    Tensors, opaque objects and the parts with the ids of `left_out` become `_LEFT_OUT`.
    """

    def __init__(self, left_out: set[int]) -> None:
        self._done: dict[int, Any] = dict.fromkeys(left_out, _LEFT_OUT)

    def mapping(self, children: Mapping[Any, Any], depth: int = 0) -> dict[str, Any]:
        """The entries under strings that are plain."""
        values = {k: self.value(v, depth + 1) for k, v in children.items() if isinstance(k, str)}
        return {k: v for k, v in values.items() if v is not _LEFT_OUT}

    def value(self, value: Any, depth: int) -> Any:
        """A dtype gives its name, a path its text, an enum's member its value."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Global):
            return value.name if value.module == "torch" else _LEFT_OUT
        if depth > MAX_NESTING or is_tensor(value):
            return _LEFT_OUT
        if id(value) not in self._done:
            self._done[id(value)] = _LEFT_OUT  # what a cycle finds
            self._done[id(value)] = self._nested(value, depth)
        return self._done[id(value)]

    def _nested(self, value: Any, depth: int) -> Any:
        if _is_sequence(value):
            return [item for item in (self.value(item, depth + 1) for item in value) if item is not _LEFT_OUT]
        if not isinstance(value, Shell):
            return self.mapping(value, depth) if isinstance(value, dict) else _LEFT_OUT
        found = value.entries()
        for inside in ("_content", "_val"):  # OmegaConf
            if inside in found:
                return self.value(found[inside], depth + 1)
        if value.kind.startswith("pathlib."):
            parts = [part for part in value.arguments if isinstance(part, str)]
            return "/".join(parts) if sum(map(len, parts)) <= MAX_PATH else _LEFT_OUT
        if found:
            return self.mapping(found, depth)
        if value.elements:
            return self.value(value.elements, depth + 1)
        return self.value(value.arguments[0], depth + 1) if len(value.arguments) == 1 else _LEFT_OUT
