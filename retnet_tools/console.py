"""What people see: results on stdout, as tables or JSON, notes and progress on stderr. Colour on a terminal alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from retnet_tools.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table
    from rich.text import Text

PLAIN_WIDTH = 200
LONG_CELL = 24
_PADDING = 2
LOG = logging.getLogger("retnet_tools")
"""Notes are its messages: `info` unless they are for `--verbose`; the command line shows them on stderr."""
_documents = 0


class _Width(NamedTuple):
    """Characters that a column needs to split no word, and to fold no line."""

    least: int
    most: int


def result_console() -> Console:
    """The console of results: stdout, wide enough to keep a row on a line where no terminal sets a width."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


class ResultTable:
    """A table without borders, for Rich to print. Numbers are never split: columns that a line has no room for go on
    below, behind the first ones again. Cells of more than `LONG_CELL` characters are folded between words, headings
    too, and so are words that are longer.

    Args:
        headings: of the columns; without any there is no line for them.
        keys: how many columns say what a line is about.
        right_from: the first column that is aligned to the right; None for none.
    """

    def __init__(self, *headings: str, keys: int = 1, right_from: int | None = None) -> None:
        self._headings, self._keys = headings, keys
        self._right_from = len(headings) if right_from is None else right_from
        self._rows: list[tuple[str | Text, ...]] = []

    def add_row(self, *cells: str | Text) -> None:
        """Add a line; a cell may have Rich's markup."""
        self._rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """The blocks of columns, one below the other."""
        columns = [self._column(i) for i in range(len(self._headings))]
        keys = list(range(self._keys))
        blocks, used = [keys], sum(columns[i].least for i in keys)
        for i, column in enumerate(columns[self._keys :], start=self._keys):
            if used + column.least > options.max_width and len(blocks[-1]) > self._keys:
                blocks.append(keys)
                used = sum(columns[i].least for i in keys)
            blocks[-1] = [*blocks[-1], i]
            used += column.least
        for number, block in enumerate(blocks):
            yield from [""] if number else []
            yield self._block(block, _widths([columns[i] for i in block], options.max_width))

    def _column(self, i: int) -> _Width:
        heading, lines = self._headings[i], [line for row in self._rows for line in _plain(row[i]).split("\n")]
        whole = [line for line in lines if len(line) <= LONG_CELL]
        words = [word for line in (heading, *lines) for word in line.split()]
        least = max([*map(len, whole), *(min(len(word), LONG_CELL) for word in words)], default=0)
        return _Width(least + _PADDING, max(map(len, (heading, *lines))) + _PADDING)

    def _block(self, block: list[int], widths: list[int]) -> Table:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(self._headings))
        for i, width in zip(block, widths, strict=True):
            justify: Literal["left", "right"] = "right" if i >= self._right_from else "left"
            table.add_column(self._headings[i], width=width - _PADDING, overflow="fold", justify=justify)
        for row in self._rows:
            table.add_row(*(row[i] for i in block))
        return table


def _plain(cell: str | Text) -> str:
    from rich.text import Text

    return cell.plain if isinstance(cell, Text) else Text.from_markup(cell).plain


def _widths(columns: list[_Width], room: int) -> list[int]:
    """What each column gets: at least what its words need, and of the rest no more than its lines."""
    widths = [column.least for column in columns]
    rest = room - sum(widths)
    # The narrowest are filled first: what they leave is for the widest.
    for i in sorted(range(len(columns)), key=lambda i: columns[i].most - columns[i].least):
        widths[i] += max(0, min(columns[i].most - columns[i].least, rest))
        rest -= widths[i] - columns[i].least
    return widths


def print_line(console: Console, text: str) -> None:
    """A line of text as it is; folded at words on a terminal, one line elsewhere."""
    console.print(text, markup=False, soft_wrap=not console.is_terminal)


def verdict(passed: bool) -> str:
    """`passed` or `failed`, coloured where the console has colours."""
    return "[green]passed[/green]" if passed else "[bold red]failed[/bold red]"


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout. NaN and infinities become null, which JSON has no other word for."""
    global _documents
    _documents += 1
    print(json.dumps(_finite(document), indent=2))


def documents_printed() -> int:
    """How many documents this process has printed: a command that fails after its own prints no second one."""
    return _documents


def print_message(text: str) -> None:
    """A note beside the results."""
    LOG.info(text)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr, on a terminal only and where notes are wanted, of what runs now."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressDisplay

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    shown = console.is_terminal and LOG.isEnabledFor(logging.INFO)
    with ProgressDisplay(*columns, console=console, disable=not shown, transient=True) as display:
        task = display.add_task("", total=None)

        def tell(what: str, done: int, total: int) -> None:
            if total != display.tasks[0].total:
                display.reset(task)
            display.update(task, description=what, completed=done, total=total)

        yield tell


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
