"""Plain values out of a pickle's tree: what a configuration may hold, without tensors and opaque objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retnet_tools.errors import InputError
from retnet_tools.formats.stand_ins import Global, Shell, is_tensor

MAX_NESTING = 32
MAX_PATH = 4096
MAX_MODULES = 100_000


class _Nothing:
    """Stands for a value that is left out."""


NOTHING = _Nothing()


def entries(value: Any) -> dict[Any, Any] | None:
    """The entries of a mapping, or the attributes and items of an object; None for anything else.

    OmegaConf's containers are what they contain. A pickled module of torch is its state dict beside its attributes.
    """
    if isinstance(value, Shell):
        found = value.entries()
        content = found.get("_content")
        if isinstance(found.get("_modules"), dict):
            attributes = {name: part for name, part in found.items() if not str(name).startswith("_")}
            return {**attributes, **_state(found)}
        return content if isinstance(content, dict) else found
    return dict(value) if isinstance(value, Mapping) else None


def _state(module: Mapping[Any, Any]) -> dict[str, Any]:
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


class PlainValues:
    """Turns parts of one tree into plain values, each part once, however often the tree refers to it.

    Args:
        left_out: ids of parts that are left out.
    """

    def __init__(self, left_out: set[int]) -> None:
        self._left_out = left_out
        self._done: dict[int, Any] = {}

    def mapping(self, children: Mapping[Any, Any], depth: int = 0) -> dict[str, Any]:
        """The entries under strings that are plain."""
        values = {k: self.value(v, depth + 1) for k, v in children.items() if isinstance(k, str)}
        return {k: v for k, v in values.items() if v is not NOTHING}

    def value(self, value: Any, depth: int = 0) -> Any:
        """The value, or `NOTHING`. A dtype gives its name, a path its text, an enum's member its value."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Global):
            return value.name if value.module == "torch" else NOTHING
        if depth > MAX_NESTING or is_tensor(value) or id(value) in self._left_out:
            return NOTHING
        if id(value) not in self._done:
            self._done[id(value)] = NOTHING  # what a cycle finds
            self._done[id(value)] = self._nested(value, depth)
        return self._done[id(value)]

    def _nested(self, value: Any, depth: int) -> Any:
        if type(value) in (list, tuple):
            return [item for item in (self.value(item, depth + 1) for item in value) if item is not NOTHING]
        if isinstance(value, Shell):
            return self._object(value, depth)
        return self.mapping(value, depth) if isinstance(value, dict) else NOTHING

    def _object(self, shell: Shell, depth: int) -> Any:
        found = shell.entries()
        for inside in ("_content", "_val"):  # OmegaConf
            if inside in found:
                return self.value(found[inside], depth + 1)
        if shell.kind.startswith("pathlib."):
            parts = [part for part in shell.arguments if isinstance(part, str)]
            return "/".join(parts) if sum(map(len, parts)) <= MAX_PATH else NOTHING
        if found:
            return self.mapping(found, depth)
        if shell.elements:
            return self.value(shell.elements, depth + 1)
        return self.value(shell.arguments[0], depth + 1) if len(shell.arguments) == 1 else NOTHING
