"""Reads the configuration that a format stores, value by value."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from retnet_tools.errors import InputError

Choice = TypeVar("Choice")

MAX_COUNT = 1 << 24
MAX_NUMBER = sys.float_info.max


@dataclass(frozen=True)
class Settings:
    """A format's own configuration as stored, read by name and type. A value of None counts as absent.

    Every reader raises `InputError` for a value of another type, and for one that is absent and has no default.
    """

    origin: str
    values: Mapping[str, Any]

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer, below a bound that keeps schedules of its length small."""
        value = self._value(name, default)
        if type(value) is not int or not 1 <= value <= MAX_COUNT:
            raise InputError(
                f"the {self.origin} configuration has {name} = {reprlib.repr(value)}",
                f"a positive integer, at most {MAX_COUNT}",
                "correct it",
            )
        return value

    def number(self, name: str, default: float) -> float:
        """A number that is not negative."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_NUMBER:
            raise InputError(
                f"the {self.origin} configuration has {name} = {reprlib.repr(value)}", "a number >= 0", "correct it"
            )
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A truth value; 0 and 1 are read as one."""
        value = self._value(name, default)
        if value not in (True, False):
            raise InputError(f"the {self.origin} configuration has {name} = {value!r}", "true or false", "correct it")
        return bool(value)

    def text(self, name: str, default: str) -> str:
        """A string."""
        return str(self._value(name, default))

    def choice(self, name: str, choices: Mapping[str, Choice], default: str) -> Choice:
        """What one of these words stands for."""
        value = self._value(name, default)
        if not isinstance(value, str) or value not in choices:
            raise InputError(
                f"the {self.origin} configuration has {name} = {value!r}",
                f"one of {', '.join(choices)}",
                "other kinds are not supported",
            )
        return choices[value]

    def has(self, name: str) -> bool:
        """Whether there is a value, other than None."""
        return self.values.get(name) is not None

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None and default is None:
            raise InputError(f"the {self.origin} configuration has no {name}", "every size of the model", "add it")
        return default if value is None else value
