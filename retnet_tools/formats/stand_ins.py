"""What stands for the functions, classes and objects that a pickle names: values that hold what was written."""

from __future__ import annotations

from typing import Any, NamedTuple


class Global:
    """The name of a function or class: its module, its name in it, and both with a dot between."""

    __slots__ = ("module", "name", "qualified")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name, self.qualified = module, name, f"{module}.{name}"


class Shell:
    """An object whose class is only a name: what it was made with, its attributes, its items."""

    __slots__ = ("arguments", "elements", "items", "kind", "parts", "state")

    def __init__(self, kind: str, arguments: tuple[Any, ...] = ()) -> None:
        self.kind, self.arguments = kind, arguments
        self.parts: list[dict[Any, Any]] = []
        self.items: dict[Any, Any] = {}
        self.elements: list[Any] = []
        self.state: Any = None

    def build(self, state: Any) -> None:
        """Take a state as an object without `__setstate__` would; one of another form is kept as it is."""
        if type(state) is dict:
            self.parts.append(state)
            return
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        if not all(part is None or isinstance(part, dict) for part in parts):
            self.state = state
            return
        self.parts += [part for part in parts if part]

    def entries(self) -> dict[Any, Any]:
        """Attributes and items together."""
        if len(self.parts) == 1 and not self.items:
            return self.parts[0]
        return {name: value for part in (*self.parts, self.items) for name, value in part.items()}


class Encoded(NamedTuple):
    """Text that stands for bytes, which nothing has made yet."""

    text: str


class Storage(NamedTuple):
    """A flat run of `numel` elements under a key of the file; `start` elements lie before it where it is a view."""

    dtype: str
    key: str
    numel: int
    start: int


class TensorView(NamedTuple):
    """A tensor as the pickle describes it, not checked against its storage yet."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class StrangeTensor(NamedTuple):
    """A tensor whose values do not lie in one storage as numbers: `kind` says why."""

    kind: str


class UnsafeGlobalError(Exception):
    """A global that is refused."""


def is_tensor(value: Any) -> bool:
    """Whether a value stands for a tensor."""
    return isinstance(value, TensorView | StrangeTensor)
