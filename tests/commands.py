"""Command lines as text: parsed as the program would, and not run."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import typer

from retnet_tools.cli.app import app

ROOT = Path(__file__).parent.parent
PROGRAM = typer.main.get_command(app)


def parse(line: str) -> None:
    """Parse `retnet-tools ...`; raises what the program would say of it."""
    program, *words = shlex.split(line)
    assert program == "retnet-tools"
    # An exception while its arguments are parsed is what is looked for here, so the root has to get by without any.
    command, parent = PROGRAM, PROGRAM.make_context(program, ["doctor"])
    while hasattr(command, "commands"):
        name, *words = words
        assert name in command.commands, f"no command {name}"
        command = command.commands[name]
        if hasattr(command, "commands"):
            parent = command.make_context(name, words[:1], parent=parent)
    command.make_context(name, words, parent=parent)


def check_script(line: str) -> None:
    """Check that `python FILE ...` names a script that has these options, by its source."""
    program, file, *words = shlex.split(line)
    assert program == "python"
    known = _options(ROOT / file)
    assert not {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)} - known, line


def _options(file: Path, seen: frozenset[Path] = frozenset()) -> set[str]:
    """The options that a script and what it imports from beside itself declare; a name may be a package's too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            beside = {file.with_name(f"{name}.py") for name in names} - seen - {file}
            found = found.union(*(_options(path, seen | {file}) for path in beside if path.is_file()))
    return found
