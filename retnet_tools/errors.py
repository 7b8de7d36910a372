"""The errors a user can meet: each is one line, and each has its exit code.

Exit codes: 0 done, 1 failure, 2 usage, 3 verification over its budget, 4 provider not available,
5 input that is missing, unsupported, unsafe or corrupt.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Row = TypeVar("Row")
MAX_SHOWN = 600
"""Characters of a part of an error."""


class RetNetToolsError(Exception):
    """Base of every error that is meant for the user.

    Args:
        found: what is there.
        expected: what should have been there; empty when `found` already says it.
        action: what to do next.

    Attributes:
        result: of a job, what it has computed and written all the same.
    """

    exit_code = 1
    result: object = None

    def __init__(self, found: str, expected: str = "", action: str = "") -> None:
        self.found, self.expected, self.action = map(_shown, (found, expected, action))
        super().__init__(found, expected, action)

    def __str__(self) -> str:
        parts = [self.found]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.action:
            parts.append(self.action)
        return " ".join("; ".join(parts).split())


def _shown(text: str) -> str:
    """A text that may quote a stranger's file, so that it can be shown: of one line, printable, not too long."""
    words = " ".join(text.split())
    if len(words) > MAX_SHOWN:
        words = f"{words[: MAX_SHOWN * 3 // 4]} ... {words[-MAX_SHOWN // 4 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


class OutputError(RetNetToolsError):
    """The output cannot be written (exit 1); one that exists already is a `UsageError`."""


class UsageError(RetNetToolsError):
    """An argument is wrong, does not fit the others, or names an output that exists already (exit 2)."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration that describes no model (exit 2); from a checkpoint it is an `InputError`."""


class VerificationError(RetNetToolsError):
    """Two forms of one model differ by more than the budget (exit 3)."""

    exit_code = 3


class ProviderError(RetNetToolsError):
    """The execution provider that was asked for cannot be had (exit 4)."""

    exit_code = 4


class InputError(RetNetToolsError):
    """A file that is missing, corrupt, incomplete, unsupported or unsafe (exit 5)."""

    exit_code = 5


class RangeError(InputError):
    """A finite number that the type it is to be stored in cannot hold (exit 5)."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`did you mean 'x'?` for the choice nearest to a word, or an empty string when none is near."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def find_row(rows: Mapping[str, Row], option: str, name: str, purpose: str = "") -> Row:
    """The row of a table that an option names.

    Raises:
        UsageError: there is none.
    """
    if name not in rows:
        raise UsageError(f"{option} {name!r}", f"one of {', '.join(rows)}{purpose}", did_you_mean(name, rows))
    return rows[name]
