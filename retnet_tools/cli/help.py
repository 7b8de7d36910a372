"""What `--help` shows: options in panels, commands in panels, examples; plain text, at once.

Typer's own panels are drawn by Rich, which takes longer to import than the help takes to read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup

SHARED = "Anywhere"
"""The panel of the options that the program has, and takes behind a command too."""
_TYPES = {"<str>": "TEXT", "<path>": "PATH", "<int>": "N", "<int range>": "N", "<float>": "X", "<float range>": "X"}
_WIDEST = 30
"""Columns of names; a longer one has its text below."""


class PanelCommand(TyperCommand):
    """A command whose help has a panel of options for each `rich_help_panel`, and examples in its epilog."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its own, and those that the program shares."""
        own, shared = super().get_params(ctx), ctx.find_root().command.params
        return [*own, *(param for param in shared if getattr(param, "rich_help_panel", None) == SHARED)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The panels: arguments, options without a panel of their own, the others as they first occur."""
        first = ("Arguments", "Options")
        _write_panels(formatter, sorted(_options(self, ctx), key=lambda row: (*first, row[0]).index(row[0])))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Examples as they are."""
        _write_examples(formatter, self.epilog)


class PanelGroup(TyperGroup):
    """A program whose commands and options are shown in panels."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Commands first."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [
            (getattr(c, "rich_help_panel", None) or "Commands", name, c.get_short_help_str(100))
            for name, c in commands
            if c
        ]
        _write_panels(formatter, [*rows, *_options(self, ctx)])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Examples as they are."""
        _write_examples(formatter, self.epilog)


def examples(*lines: str) -> str:
    """An epilog of commands to copy, `retnet-tools` left out."""
    return "\n".join(f"retnet-tools {line}" for line in lines)


def _options(command: Any, ctx: Any) -> Iterable[tuple[str, str, str]]:
    """Panel, names and text of each parameter."""
    for param in command.get_params(ctx):
        if (record := param.get_help_record(ctx)) is not None:
            name, text = record
            for type_name, word in _TYPES.items():
                name = name.replace(type_name, word)
            panel = "Arguments" if param.param_type_name == "argument" else "Options"
            yield getattr(param, "rich_help_panel", None) or (SHARED if param.name == "help" else panel), name, text


def _write_panels(formatter: Any, rows: Iterable[tuple[str, str, str]]) -> None:
    panels: dict[str, list[tuple[str, str]]] = {}
    for panel, name, text in rows:
        panels.setdefault(panel, []).append((name, text))
    names = [len(name) for lines in panels.values() for name, _ in lines if len(name) <= _WIDEST]
    for panel, lines in sorted(panels.items(), key=lambda item: item[0] == SHARED):
        with formatter.section(panel):
            # One column of names in all panels.
            formatter.write_dl([(name.ljust(max(names, default=0)), text) for name, text in lines], col_max=_WIDEST)


def _write_examples(formatter: Any, epilog: str | None) -> None:
    if epilog:
        with formatter.section("Examples"):
            for line in epilog.splitlines():
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
