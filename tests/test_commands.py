"""Every command that a page shows, or that a record says it came from, is one that the program takes today."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import PROGRAM, ROOT, check_script, parse

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
RECORDS = sorted((ROOT / "benchmarks").rglob("*.json"))
SCRIPTS = [
    file
    for file in sorted((ROOT / "benchmarks").glob("*.py"))
    if all(word in file.read_text(encoding="utf-8") for word in ("__main__", "ArgumentParser"))
]


def shown(text: str) -> Iterator[str]:
    """Commands between backticks, and lines of blocks; without comments, pipes and what is left out."""
    spans = re.findall(r"`((?:retnet-tools|python) [^`\n]+)`", text)
    lines = re.findall(r"^(?:\$ )?((?:retnet-tools|python) [^\n]+)$", text, re.MULTILINE)
    for command in (*spans, *lines):
        yield re.split(r"\s+(?:[|>#;]|&&)(?:\s|$)", command)[0].removesuffix(" ...")


def recorded(document: Any) -> Iterator[str]:
    if isinstance(document, dict):
        yield from (value for key, value in document.items() if key == "command" and isinstance(value, str))
    for value in document.values() if isinstance(document, dict) else document if isinstance(document, list) else ():
        yield from recorded(value)


def check(command: str) -> None:
    program, *words = command.split()
    if program == "quantize":
        # What quantization_quality.py adds a folder to.
        parse(f"retnet-tools {command} out/")
    elif program == "python":
        if words[0] not in ("-m", "-c"):
            check_script(command)
    elif len(words) == 1 and not words[0].startswith("-"):
        # A command's name.
        assert words[0] in PROGRAM.commands, command
    else:
        parse(command)


FOUND = {page: list(dict.fromkeys(shown(page.read_text(encoding="utf-8")))) for page in PAGES}
FOUND |= {file: list(dict.fromkeys(recorded(json.loads(file.read_text(encoding="utf-8"))))) for file in RECORDS}
COMMANDS = [(file, command) for file, commands in FOUND.items() for command in commands]


@pytest.mark.parametrize(("file", "command"), COMMANDS, ids=[f"{file.name}-{command}" for file, command in COMMANDS])
def test_a_command_that_is_shown_is_taken(file: Path, command: str) -> None:
    check(command)


def test_pages_and_records_have_commands() -> None:
    for name in ("README.md", "benchmarks.md", "cpu-int8.json", "torchscale_step.json", "quantization_quality.json"):
        (file,) = [file for file in FOUND if file.name == name]
        assert FOUND[file], name


@pytest.mark.parametrize(
    "command", ["retnet-tools bench --sise 1.3b", "retnet-tools benhc -t 2", "python benchmarks/decode.py --sise 1.3b"]
)
def test_a_command_that_is_not_is_found_out(command: str) -> None:
    with pytest.raises(Exception, match=r"sise|benhc"):
        check(command)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_a_script_says_what_it_does(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, from which what lies beside the script is taken again: its names are no one else's."""
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(script.parent)
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
    finally:
        for beside in script.parent.glob("*.py"):
            sys.modules.pop(beside.stem, None)
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert out.startswith("usage: ")
