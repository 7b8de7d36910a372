"""Tables say what the rows say, on a terminal, in Markdown and in CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest

from retnet_tools.bench.options import Case
from retnet_tools.bench.results import SkippedTest
from retnet_tools.bench.text import comma_separated, markdown, parse_format, render_benchmark
from retnet_tools.errors import UsageError
from tests.bench.reports import GRID, report, row


def test_a_table_has_a_line_for_each_row_and_each_part(capsys: pytest.CaptureFixture[str]) -> None:
    render_benchmark(report(GRID, flat=True, profile=True))
    lines = capsys.readouterr().out.splitlines()
    assert "1.3b: 1000.0 million parameters, float32, int8 in 128s" in lines[0]
    assert "Some processor, 2 cores, 24 GiB" in lines[1]
    assert sum(line.startswith(("retnet ", "transformer tg")) or " tg8" in line for line in lines) >= len(GRID)
    skipped = "transformer tg8 @ d32768, batch 64, 2 threads: not measured, it needs 900.0 GB"
    assert any(line.startswith(skipped) for line in lines)
    assert any("1,000,000" in line and "6.0e-05" in line for line in lines)
    assert any("no difference; at most 0.9% of a step" in line for line in lines)
    assert any("differences include those of int8 in 128s" in line for line in lines)
    assert any("median of the ratios within each repetition" in line for line in lines)
    assert any(line.startswith("MatMulNBits") and "75.0%" in line for line in lines)
    assert any(line.startswith("outside operators") and "9.000" in line and "22.5%" in line for line in lines)
    case = (
        "Profile of RetNet tg16, batch 1, 2 threads: a step takes 40.000 ms; taking the profile costs time, 10.000 ms"
    )
    assert any(line.startswith(case) for line in lines)


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
    assert [len(table) for table in tables] == [2 + len(rows), 2 + 4, 2 + 3]
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


def test_a_test_that_ran_less_often_says_so() -> None:
    skip = SkippedTest("torch", "tg8", 4, None, "it is gone", 2)
    text = markdown(replace(report(GRID), skipped=(skip,)))
    assert "torch tg8, batch 4, all threads: measured 2 times only, it is gone" in text


def test_a_gpu_copies_and_its_steps_say_whether_they_were_captured(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [replace(GRID[0], device="cuda", cuda_graph=graph, device_bytes=10**9) for graph in (True, False)]
    rows.append(replace(row("retnet", Case("prefill", 8, 0, 1)), device="cuda", device_bytes=10**9))
    profile = replace(report([], profile=True).profile, device="cuda")
    text = markdown(replace(report(rows), device="cuda", device_name="Some GPU", profile=profile))
    assert "copies 2.0 to 2.0 GB/s" in text
    table = [line.split(" | ") for line in text.splitlines() if line.startswith(("| test", "| tg8", "| pp8"))]
    place = table[0].index("CUDA graph")
    assert [line[place] for line in table] == ["CUDA graph", "yes", "no", "-"]
    assert "of copy limit" in table[0]
    assert "launching kernels one by one takes 40.000 ms" in text
    assert "| launch ms a step |" in text
    assert "reads 2" not in text


def test_measured_memory_of_a_sequence_is_a_column_where_it_is_known() -> None:
    assert "| measured |" not in markdown(report(GRID))
    text = markdown(report([replace(GRID[0], memory_per_sequence=5e6, state_buffers=2)]))
    assert f"| {2 * GRID[0].state_bytes_per_sequence / 1e6:.1f} | 5.0 |" in text
