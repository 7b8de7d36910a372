"""Consoles and tables for results on stdout: colour on a terminal, aligned plain text everywhere."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

PLAIN_WIDTH = 200


def result_console() -> Console:
    """The console of results: stdout, wide enough to keep a row on a line where no terminal sets a width."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def result_table(*columns: str) -> Table:
    """An empty table with these headings, without borders; a cell too wide for the terminal is folded, never cut."""
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
