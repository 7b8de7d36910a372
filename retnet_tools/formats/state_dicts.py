"""Which part of a file is the state dict, and what else lies beside it.

The state dict is the one mapping from names to tensors, at most four keys deep, beside optimizers, schedulers and
random states, which their keys tell. A copy that a key calls an average (EMA) counts where there is no other.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from retnet_tools.errors import InputError, UsageError, did_you_mean
from retnet_tools.formats.plain_values import PlainValues, entries
from retnet_tools.formats.stand_ins import StrangeTensor, TensorView, is_tensor

Tensor = TensorView | StrangeTensor
MAX_DEPTH = 4
MAX_ENTRIES = 1_000_000
MAX_SEQUENCE = 16
MAX_NAME = 256
# torch's AveragedModel stores how many models its average is of.
AVERAGE_COUNT = "n_averaged"
AVERAGE_WORDS = frozenset({"ema", "average", "averaged", "averages", "avg", "shadow", "swa", "polyak"})
_BESIDE = re.compile(
    r"opts?|optims?|optimi[sz].*|adamw?|sgd|lion|lamb|muon|adafactor|adagrad|rmsprop|sched.*|rng|random|grads?|gradients?"
    r"|callbacks?|loops|dataloader|sampler"
)
_NO_SETTINGS = re.compile(r".*(optim|rng|random|callbacks).*", re.IGNORECASE)
_OPTIMIZER_NAMES = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg"})


@dataclass
class Choice:
    """A state dict, chosen.

    Attributes:
        tensors: its names and what they stand for.
        entry: the path of its key, empty where it is the whole file.
        notes: what the user should know about it.
        embedded: the other mappings and objects of the file by dotted path, plain values only.
    """

    tensors: Mapping[str, Any]
    entry: str
    notes: list[str]
    embedded: dict[str, dict[str, Any]] = field(default_factory=dict)


def choose_state_dict(tree: Any, file: str, entry: str | None = None) -> Choice:
    """The state dict of a file's tree, the one of this entry where it is named.

    Raises:
        InputError: none, or several and no entry that tells which.
        UsageError: no such entry.
    """
    found = _candidates(tree)
    choice = choose({path: tensors for path, (_, tensors) in found.items()}, file, entry)
    taken = {id(owner) for owner, _ in found.values()}
    choice.embedded = _embedded(tree, taken)
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
    chosen = [entry] if entry is not None else models or averages
    if len(chosen) > 1:
        names = ", ".join(chosen[:4]) + (", ..." if len(chosen) > 4 else "")
        raise InputError(f"{file} holds several sets of weights: {names}", "one", "choose with --entry NAME")
    notes = [
        f"the file also holds {path}, an average of these weights: --entry {path} reads it"
        for path in averages
        if path not in chosen
    ]
    if chosen[0] in averages and entry is None:
        notes.append(f"these weights are {chosen[0]}, an average")
    tensors = dict(candidates[chosen[0]])
    if tensors.pop(AVERAGE_COUNT, None) is not None:
        notes.append(f"these weights are an average of a training run's ({AVERAGE_COUNT})")
    return Choice(tensors, chosen[0], notes)


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


def _walk(tree: Any) -> Iterator[tuple[tuple[str, ...], Any, dict[Any, Any]]]:
    """Every mapping, object and short sequence by path, breadth first, each once."""
    queue: deque[tuple[tuple[str, ...], Any]] = deque([((), tree)])
    seen: set[int] = set()
    left = MAX_ENTRIES
    while queue:
        path, value = queue.popleft()
        children = entries(value)
        if children is None and type(value) in (list, tuple) and len(value) <= MAX_SEQUENCE:
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


def _candidates(tree: Any) -> dict[str, tuple[Any, dict[str, Tensor]]]:
    found: dict[str, tuple[Any, dict[str, Tensor]]] = {}
    seen: set[tuple[tuple[str, Tensor], ...]] = set()
    for path, owner, children in _walk(tree):
        named = not isinstance(owner, list | tuple)
        tensors = {k: v for k, v in children.items() if isinstance(k, str) and is_tensor(v)} if named else {}
        if not tensors or not _OPTIMIZER_NAMES.isdisjoint(tensors) or is_beside_weights(".".join(path)):
            continue
        # Tensors among other things are a state dict where they are a model's, under dotted names.
        if len(tensors) < len(children) and not any("." in k and _is_matrix(v) for k, v in tensors.items()):
            continue
        if (contents := tuple(tensors.items())) in seen:
            continue
        seen.add(contents)
        for part, names in averages_apart(".".join(path), tensors).items():
            found[part] = owner, names
    matrices = {path: c for path, c in found.items() if any(map(_is_matrix, c[1].values()))}
    return matrices or found


def _is_matrix(tensor: Any) -> bool:
    return isinstance(tensor, StrangeTensor) or len(tensor.shape) > 1


def _embedded(tree: Any, taken: set[int]) -> dict[str, dict[str, Any]]:
    plain = PlainValues(taken)
    found = {}
    for path, owner, children in _walk(tree):
        if isinstance(owner, list | tuple):
            continue
        values = plain.mapping(children)
        if values:
            found[".".join(path)] = values
    return found
