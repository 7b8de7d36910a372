"""The table of planted faults, `mutants.toml`: what is changed where, and the tests that own the file."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

ROOT = Path(__file__).parent.parent.parent
TABLE = Path(__file__).with_name("mutants.toml")

Kind = Literal[
    "mathematics", "positions", "masks", "scales", "samplers", "writers", "verdicts", "buffers", "readers", "records"
]
KINDS: tuple[Kind, ...] = get_args(Kind)


class TableError(Exception):
    """A row that no longer fits the code."""


@dataclass(frozen=True)
class Fault:
    """A change that makes the program wrong.

    Attributes:
        file: that is changed, from the root of the repository.
        kind: of what it spoils.
        what: is wrong then, in words.
        old: text that stands in the file exactly once.
        new: what takes its place.
        tests: files or functions, `FILE` or `FILE::NAME`, that have to notice.
        hang: whether a run that does not end counts as noticed.
    """

    file: str
    kind: Kind
    what: str
    old: str
    new: str
    tests: tuple[str, ...]
    hang: bool = False

    def __str__(self) -> str:
        return f"{self.file}: {self.what} ({self.kind})"

    def plant(self, root: Path) -> str:
        """The text of the file with the fault in it.

        Raises:
            TableError: `old` does not stand in it exactly once, or is what takes its place, but for spaces.
        """
        text = (root / self.file).read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise TableError(f"{self}: the old text stands {count} times in the file, expected once: mend the row")
        if self.old.split() == self.new.split():
            raise TableError(f"{self}: the new text says the same as the old: mend the row")
        return text.replace(self.old, self.new)


def read_table(path: Path = TABLE) -> list[Fault]:
    """All rows: `[[file]]` with its `path` and `tests`, each with `[[file.fault]]`, which may have tests of its own.

    Raises:
        TableError: a row with a field that is unknown or missing.
    """
    faults = []
    for entry in tomllib.loads(path.read_text(encoding="utf-8"))["file"]:
        for row in entry["fault"]:
            fields: dict[str, Any] = {"file": entry["path"], "tests": entry["tests"], **row}
            fields["tests"] = tuple(fields["tests"])
            try:
                faults.append(Fault(**fields))
            except TypeError as error:
                raise TableError(f"{entry['path']}: {row.get('what')}: {error}") from error
    return faults


def missing_tests(fault: Fault, root: Path = ROOT) -> list[str]:
    """Those of its tests that do not exist: cases of a test have no name of their own here."""
    return [test for test in fault.tests if not _exists(test, root)]


def _exists(test: str, root: Path) -> bool:
    file, _, name = test.partition("::")
    return (root / file).is_file() and (not name or name in _functions(root / file))


@cache
def _functions(file: Path) -> set[str]:
    return set(re.findall(r"^def (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE))
