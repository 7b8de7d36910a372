"""Tables on narrow terminals: every number stands whole at 60, 80 and 120 columns, and no line is wider."""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from retnet_tools.bench.text import render_benchmark
from retnet_tools.console import LONG_CELL, ResultTable
from retnet_tools.formats import open_checkpoint
from retnet_tools.graph.export import plan_export, write_export
from tests.bench.reports import GRID, report

SHAKESPEARE = Path(__file__).parents[2] / "fixtures" / "shakespeare"
WIDE, WIDTHS = 400, (60, 80, 120)


def printed(table: ResultTable, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(table)
    return console.file.getvalue().splitlines()


def numbers(lines: list[str]) -> Counter[str]:
    """Numbers with their signs and units, of words that are short enough to stand whole."""
    words = [word for line in lines for word in line.split() if len(word) <= LONG_CELL]
    return Counter(found for word in words for found in re.findall(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?%?", word))


def check(table: ResultTable) -> None:
    """Columns may be repeated, and nothing may be missing."""
    whole = numbers(printed(table, WIDE))
    for width in WIDTHS:
        lines = printed(table, width)
        assert max(map(len, lines)) <= width
        assert not whole - numbers(lines), lines


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[ResultTable]:
    """The tables that are printed."""
    found: list[ResultTable] = []
    plain = Console.print

    def print(self: Console, *objects: object, **options: object) -> None:
        found.extend(item for item in objects if isinstance(item, ResultTable))
        plain(self, *objects, **options)

    monkeypatch.setattr(Console, "print", print)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export, a text and a saved state."""
    folder = tmp_path_factory.mktemp("width")
    plan = plan_export(open_checkpoint(SHAKESPEARE), dtype="float32", ops="fused")
    write_export(plan, folder / "out", force=False, progress=lambda count: None)
    (folder / "text").write_text("To be, or not to be, that is the question.\n" * 8)
    return folder


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["inspect", "{model}"], 3),
        (["inspect", "{out}"], 3),
        (["convert", "{model}", "{folder}/converted", "--dry-run"], 1),
        (["verify", "{model}", "--tokens", "32"], 1),
        (["perplexity", "{out}", "--text", "{text}", "-c", "16", "--against", "{model}", "--by-position"], 2),
        (["doctor", "{out}", "--no-self-test"], 1),
        (["state", "save", "{out}", "-p", "ROMEO. ", "-o", "{folder}/one", "--force"], 1),
        (["state", "diff", "{folder}/one", "{folder}/one"], 1),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_no_number_of_a_command_is_split(words, count, folder: Path, tables: list[ResultTable], cli) -> None:
    places = {"model": SHAKESPEARE, "out": folder / "out", "text": folder / "text", "folder": folder}
    if words[1] == "diff":
        cli("state", "save", folder / "out", "-p", "ROMEO. ", "-o", folder / "one", "--force")
        tables.clear()
    result = cli(*(word.format(**places) for word in words))
    assert result.exit_code == 0, result.err
    assert len(tables) == count
    for table in tuple(tables):
        check(table)


def test_no_number_of_a_benchmark_is_split(tables: list[ResultTable], capsys) -> None:
    render_benchmark(report(GRID, flat=True, profile=True))
    assert len(tables) == 3
    for table in tuple(tables):
        check(table)


def test_columns_without_room_go_on_below_behind_their_keys() -> None:
    table = ResultTable("name", "size", "first", "second", keys=2)
    table.add_row("a", "1", "123456789.5 ± 0.25", "987654321.5 ± 0.75")
    assert [line.split() for line in printed(table, 40)] == [
        ["name", "size", "first"],
        ["a", "1", "123456789.5", "±", "0.25"],
        [],
        ["name", "size", "second"],
        ["a", "1", "987654321.5", "±", "0.75"],
    ]
    assert len(printed(table, 80)) == 2


def test_the_short_lines_of_a_cell_are_not_folded() -> None:
    table = ResultTable("name", "one", "two", "three")
    figures = ["1.25 ± 0.50", "2.25 ± 0.75", "3.25 ± 1.00"]
    table.add_row("a", *3 * ["\n".join(figures)])
    text = "\n".join(printed(table, 30))
    assert [text.count(figure) for figure in figures] == [3, 3, 3]


def test_long_text_is_folded_and_nothing_is_lost() -> None:
    table = ResultTable("name", "what it is")
    table.add_row("x" * 70, " ".join(f"{n}00" for n in range(1, 40)))
    lines = printed(table, 60)
    assert max(map(len, lines)) <= 60
    assert "".join(lines).count("x") == 70
    assert set(" ".join(lines).split()) >= {f"{n}00" for n in range(1, 40)}


def test_a_table_without_headings_has_no_line_for_them() -> None:
    table = ResultTable("", "")
    table.add_row("[green]passed[/green]", "1")
    assert [line.split() for line in printed(table, 60)] == [["passed", "1"]]
