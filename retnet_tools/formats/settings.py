"""Reads the configuration that a format stores, value by value, and leaves no key of it unexplained.

A format declares the keys that it reads, those that may hold one value only, those that cannot touch the mathematics,
and older names. Any other key must be neutral (None, False, 0 or empty): what it would have meant nobody here knows.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from retnet_tools.errors import InputError, UsageError, did_you_mean

Choice = TypeVar("Choice")

MAX_COUNT, MAX_NUMBER, MAX_SHOWN = 1 << 24, sys.float_info.max, 60


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


@dataclass(frozen=True)
class Only:
    """A key that must hold one of these values, or be absent; `expected` says for the error what they mean."""

    values: tuple[Any, ...]
    expected: str


@dataclass(frozen=True)
class Keys:
    """The configuration keys of a format.

    Attributes:
        read: keys whose values `Settings` gives.
        only: keys that select a kind of model of which one is supported.
        inert: keys that cannot touch the mathematics of a trained model.
        aliases: from older names to those of `read`.
    """

    read: frozenset[str]
    only: Mapping[str, Only] = field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def known(self) -> frozenset[str]:
        """All keys that mean something to the format."""
        return self.read | self.inert | frozenset(self.only) | frozenset(self.aliases)


@dataclass(frozen=True)
class Settings:
    """A format's own configuration as stored, read by name and type. A value of None counts as absent.

    Every reader raises `InputError` for a value of another type, and for one that is absent and has no default.

    Attributes:
        origin: whose configuration it is, for errors.
        values: by the format's present names.
        keys: what the format declares; a key that is read without being declared is a fault of the reader.
        given: the older names under which values stand in the document, by present name.
    """

    origin: str
    values: Mapping[str, Any]
    keys: Keys | None = None
    given: Mapping[str, str] = field(default_factory=dict)
    _consulted: set[str] = field(default_factory=set, compare=False, repr=False)
    _assumed: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def declared(cls, origin: str, document: Mapping[str, Any], keys: Keys, ignored: Collection[str] = ()) -> Settings:
        """The settings of a stored document, every key of which is known, neutral, or ignored as the user says.

        Raises:
            InputError: a key that is not known or holds what is not supported, or two names of one key that differ.
            UsageError: a key to be ignored that the format reads.
        """
        for name in ignored:
            if name in keys.read | keys.aliases.keys():
                raise UsageError(f"--ignore-key {name}", f"a key that {origin} does not read", "correct its value")
        values = {name: value for name, value in document.items() if name not in ignored}
        given: dict[str, str] = {}
        for old, new in keys.aliases.items():
            value = values.pop(old, None)
            if value is None:
                continue
            given.setdefault(new, old)
            if values.get(new) not in (None, value):
                shown = f"{old} = {reprlib.repr(value)} and {new} = {reprlib.repr(values[new])}"
                two = "one value, since they are two names of one setting"
                raise InputError(f"the {origin} configuration has {shown}", two, "correct it")
            values[new] = value
        settings = cls(origin, values, keys, given)
        for name, value in values.items():
            settings._explain(keys, name, value)
        return settings

    def _explain(self, keys: Keys, name: str, value: Any) -> None:
        only = keys.only.get(name)
        if only is not None and value is not None and value not in only.values:
            raise self.wrong(name, value, only.expected, "this kind of model is not supported")
        if only is None and name not in keys.read | keys.inert and not _is_neutral(value):
            hint, ignore = did_you_mean(name, keys.read), f"--ignore-key {name[:MAX_SHOWN]}"
            action = f"{hint} or {ignore}" if hint else f"where it does not change the model, add {ignore}"
            raise self.wrong(name, value, "only keys that this format knows", action)

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer, below a bound that keeps schedules of its length small."""
        value = self._value(name, default)
        if type(value) is not int or not 1 <= value <= MAX_COUNT:
            raise self.wrong(name, value, f"a positive integer, at most {MAX_COUNT}")
        return value

    def size(self, name: str, default: int) -> int:
        """A size of the model, for which the format's code has a default; that it is taken is noted."""
        if not self.has(name):
            self._assumed[name] = default
        return self.count(name, default)

    def number(self, name: str, default: float) -> float:
        """A number that is not negative."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_NUMBER:
            raise self.wrong(name, value, "a number >= 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A truth value; 0 and 1 are read as one."""
        value = self._value(name, default)
        if not isinstance(value, bool | int) or value not in (0, 1):
            raise self.wrong(name, value, "true or false")
        return bool(value)

    def text(self, name: str, default: str) -> str:
        """A string."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, value, "text")
        return value

    def choice(self, name: str, choices: Mapping[str, Choice], default: str) -> Choice:
        """What one of these words stands for."""
        value = self._value(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(name, value, f"one of {', '.join(choices)}", "other kinds are not supported")
        return choices[value]

    def raw(self, name: str) -> Any:
        """The value as it is stored; None where it is absent."""
        if self.keys is not None and name not in self.keys.read and name not in self.keys.only:
            raise AssertionError(f"the reader of {self.origin} does not declare {name!r}")
        self._consulted.add(name)
        return self.values.get(name)

    def has(self, name: str) -> bool:
        """Whether there is a value, other than None."""
        return self.raw(name) is not None

    def notes(self) -> list[str]:
        """Sizes that the configuration leaves to the format's code, and keys that do nothing in this model: one note
        each."""
        read = frozenset() if self.keys is None else self.keys.read
        assumed = [f"{name} is not in the configuration: {default} assumed" for name, default in self._assumed.items()]
        return assumed + [
            f"{self.given.get(name, name)} = {reprlib.repr(value)} in the configuration does nothing in this model"
            for name, value in self.values.items()
            if name in read and name not in self._consulted and not _is_neutral(value)
        ]

    def wrong(self, name: str, value: Any, expected: str, action: str = "correct it") -> InputError:
        """The error for a value that cannot be."""
        shown = self.given.get(name, name)[:MAX_SHOWN]
        return InputError(f"the {self.origin} configuration has {shown} = {reprlib.repr(value)}", expected, action)

    def _value(self, name: str, default: Any) -> Any:
        value = self.raw(name)
        if value is None and default is None:
            raise InputError(f"the {self.origin} configuration has no {name}", "every size of the model", "add it")
        return default if value is None else value


def _is_neutral(value: Any) -> bool:
    return value is None or (isinstance(value, bool | int | float | str | list | tuple | dict) and not value)
