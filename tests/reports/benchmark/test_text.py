"""Tables say what the rows say, on a terminal, in Markdown and in CSV."""

from __future__ import annotations

import csv
import io

import pytest

from retnet_tools.errors import UsageError
from retnet_tools.reports.benchmark.options import Case
from retnet_tools.reports.benchmark.text import comma_separated, markdown, parse_format, render_benchmark
from tests.reports.benchmark.reports import GRID, report, row


def test_a_table_has_a_line_for_each_row_and_each_part(capsys: pytest.CaptureFixture[str]) -> None:
    render_benchmark(report(GRID, flat=True, profile=True))
    lines = capsys.readouterr().out.splitlines()
    assert "1.3b: 1000.0 million parameters, float32, int8 in 128s" in lines[0]
    assert "Some processor, 2 cores, 24 GiB" in lines[1]
    assert sum(line.startswith(("retnet ", "transformer tg")) or " tg8" in line for line in lines) >= len(GRID)
    assert any("tg8 @ d32768, batch 64: not measured, its states need 900.0 GB" in line for line in lines)
    assert any("1,000,000" in line and "6.0e-05" in line for line in lines)
    assert any("no difference" in line for line in lines)
    assert any(line.startswith("MatMulNBits") and "90.0%" in line for line in lines)


def test_a_lone_model_has_no_column_of_implementations(capsys: pytest.CaptureFixture[str]) -> None:
    render_benchmark(report([row("retnet", Case("decode", 8, 0, 1))]))
    text = capsys.readouterr().out
    assert "implementation" not in text
    assert "RetNet is" not in text
    assert "first token" not in text


def test_markdown_tables_have_equal_columns() -> None:
    rows = [row("retnet", Case("prefill", 64, 0, 1)), *GRID]
    text = markdown(report(rows, flat=True, profile=True))
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [len(table) for table in tables] == [2 + len(rows), 2 + 4, 2 + 2]
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
        assert set(table[1]) == set("| -")


def test_csv_has_every_field_of_every_row() -> None:
    rows = list(csv.DictReader(io.StringIO(comma_separated(report(GRID)))))
    assert len(rows) == len(GRID)
    for read, written in zip(rows, GRID, strict=True):
        assert read["implementation"] == written.implementation
        assert float(read["tokens_per_second"]) == written.tokens_per_second
        assert tuple(map(float, read["repetitions"].split(";"))) == written.repetitions
        assert (read["retnet_speedup"] == "") == (written.retnet_speedup is None)


def test_formats_are_known_by_name() -> None:
    assert parse_format(" MD ") == "md"
    with pytest.raises(UsageError, match="table, md, csv, json"):
        parse_format("xml")
