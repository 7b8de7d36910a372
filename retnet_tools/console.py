"""What people see: results on stdout, as tables or JSON, notes and progress on stderr. Colour on a terminal alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from retnet_tools.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PLAIN_WIDTH = 200
LOG = logging.getLogger("retnet_tools")
"""Notes are its messages: `info` unless they are for `--verbose`; the command line shows them on stderr."""
_documents = 0


def result_console() -> Console:
    """The console of results: stdout, wide enough to keep a row on a line where no terminal sets a width."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def result_table(*columns: str) -> Table:
    """An empty table with these headings, without borders; a cell too wide for the terminal is folded, never cut."""
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for column in table.columns:
        column.overflow = "fold"
    return table


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
