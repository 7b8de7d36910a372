"""Frozen dataclasses of plain values: checked field by field against the types they declare, and read from JSON."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from retnet_tools.errors import ConfigError

MAX_SIZE = (1 << 63) - 1
_IN_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "text",
    str | Path: "text or a path",
}
_IN_PLURAL = {float: "finite numbers", str: "texts"}


def check_types(instance: Any, prefix: str = "") -> None:
    """Check that every field holds what its annotation says: a Python that ignores annotations would take `"no"` as
    true.

    Known are bool, int, float (finite; an int will do), str, `Literal`, `Annotated[str, table]` (a key of the table
    when it is looked at), classes, unions of them (of dataclasses those that the choices of their field `type` tell
    apart), `tuple[X, ...]` and `Sequence[X]` of one of these, which have to be tuples, and each or None.

    Raises:
        ConfigError: a field of another type, by name.
    """
    for name, kind in _types(instance.__class__).items():
        _check(prefix + name, getattr(instance, name), kind)


def check_size(name: str, value: int) -> None:
    """Refuse an integer that is no size of anything: below 1, or beyond 2^63 - 1."""
    if not 1 <= value <= MAX_SIZE:
        raise ConfigError(f"{name} is {reprlib.repr(value)}", "a positive integer, below 2^63")


def check_positive(name: str, value: float) -> None:
    """Refuse a number that is not above zero."""
    if not value > 0:
        raise ConfigError(f"{name} is {value}", "a positive number")


def check_not_negative(name: str, value: float) -> None:
    """Refuse a number below zero."""
    if not value >= 0:
        raise ConfigError(f"{name} is {value}", "a number >= 0")


def from_json(kind: Any, data: Any, where: str = "") -> Any:
    """The dataclass `kind` from a JSON object of its fields; inner dataclasses are objects, tuples are lists.

    Args:
        where: the field that the object is the value of; empty for a whole configuration.

    Raises:
        ConfigError: a field that is unknown, missing or of the wrong type, by name.
    """
    types, this = _types(kind), where or "config"
    if not isinstance(data, Mapping):
        raise ConfigError(f"{this} is {type(data).__name__}", "an object with named fields")
    if unknown := sorted(set(data) - set(types)):
        raise ConfigError(f"{this} has unknown field {unknown[0]!r}", f"only {', '.join(types)}")
    required = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    if missing := sorted(required - set(data)):
        raise ConfigError(f"{this} has no field {missing[0]!r}", "every required field")
    prefix = f"{where}." if where else ""
    return kind(**{name: _value(prefix + name, value, types[name]) for name, value in data.items()})


@functools.cache
def _types(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _value(name: str, value: Any, kind: Any) -> Any:
    if NoneType in get_args(kind):
        return None if value is None else _value(name, value, _without_none(kind))
    if isinstance(kind, UnionType):
        kind = _member(name, value, get_args(kind))
    if dataclasses.is_dataclass(kind):
        return from_json(kind, value, name)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise _wrong(name, value, f"a list of {_IN_PLURAL.get(get_args(kind)[0], 'objects')}")
        return tuple(_value(f"{name}[{i}]", item, get_args(kind)[0]) for i, item in enumerate(value))
    _check(name, value, kind)
    return float(value) if kind is float else value


def _member(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    """The one of several dataclasses whose field `type` may be what it is in a JSON object."""
    if not isinstance(value, Mapping) or "type" not in value:
        return kinds[0]
    choices = {kind: _choices(_types(kind)["type"]) for kind in kinds}
    for kind in kinds:
        if value["type"] in choices[kind]:
            return kind
    words = ", ".join(word for kind in kinds for word in choices[kind])
    raise _wrong(f"{name}.type", value["type"], f"one of {words}")


def _check(name: str, value: Any, kind: Any) -> None:
    if NoneType in get_args(kind):
        if value is not None:
            _check(name, value, _without_none(kind))
    elif get_origin(kind) in (Literal, Annotated):
        # 1 == True and 4 == 4.0, but they are not the same choice.
        if not any(value == choice and type(value) is type(choice) for choice in _choices(kind)):
            raise _wrong(name, value, f"one of {', '.join(map(str, _choices(kind)))}")
    elif get_origin(kind) in (tuple, Sequence):
        if not isinstance(value, tuple):
            raise _wrong(name, value, f"a tuple of {_IN_PLURAL.get(get_args(kind)[0], 'objects')}")
        for i, item in enumerate(value):
            _check(f"{name}[{i}]", item, get_args(kind)[0])
    elif kind is float:
        if not _is_finite(value):
            raise _wrong(name, value, _IN_WORDS[float])
    elif not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _wrong(name, value, _IN_WORDS.get(kind, getattr(kind, "__name__", str(kind))))


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is Literal else tuple(kind.__metadata__[0])


def _without_none(kind: Any) -> Any:
    return functools.reduce(operator.or_, (member for member in get_args(kind) if member is not NoneType))


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _wrong(name: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{name} is {reprlib.repr(value)}", expected)
