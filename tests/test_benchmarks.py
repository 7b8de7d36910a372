"""The benchmarks of record: their commands are ones that `bench` takes, and README's tables are made of the records."""

from __future__ import annotations

import importlib
import json
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import typer

from retnet_tools.cli.app import app
from retnet_tools.cli.benching import options
from retnet_tools.reports.benchmark.options import Case
from retnet_tools.reports.benchmark.results import benchmark_document
from tests.reports.benchmark.reports import GRID, report, row

ROOT = Path(__file__).parent.parent


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch):
    """Imports a script of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def parsed(command: str) -> dict[str, object]:
    bench = typer.main.get_command(app).commands["bench"]
    return bench.make_context("bench", shlex.split(command)).params


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_command_of_record_is_one(device: str, scripts) -> None:
    record = scripts("record")
    runs = record.RUNS[device]
    assert len({run.name for run in runs}) == len(runs) >= 5
    for run in runs:
        found = parsed(run.options.format(size="1.3b"))
        names = ("prompts", "tokens", "depths", "batches", "threads", "repetitions", "against")
        options(*(found[name] for name in names), quick=False, flat=found["flat"])
        assert found["size"] in ("1.3b", "6.7b")


def document(*, flat: bool = False) -> dict[str, object]:
    rows = [row("retnet", Case("prefill", 64, 0, 1)), *GRID, row("retnet", Case("decode", 8, 8192, 1))]
    rows.append(row("transformer", Case("decode", 8, 8192, 1), seconds=0.03))
    found = benchmark_document(report(rows, flat=flat, profile=True))
    return {"command": "retnet-tools bench -d 8192", "recorded": "2026-11-24", **json.loads(json.dumps(found))}


@pytest.fixture
def tables(scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = scripts("readme_tables")
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_every_section_is_made_of_its_records(tables: ModuleType, tmp_path: Path) -> None:
    for name in ("float32", "transformer", "context"):
        (tmp_path / f"cpu-{name}.json").write_text(json.dumps(document()))
    (tmp_path / "cpu-flat.json").write_text(json.dumps(document(flat=True)))
    names = ("decode", "prefill", "transformer", "context", "flat", "operators")
    old = "".join(f"before {n}\n<!-- bench:cpu-{n} -->\nold\n<!-- /bench:cpu-{n} -->\n" for n in names)
    new = tables.rewritten(old)
    assert "old" not in new
    assert [f"before {n}" in new for n in names] == [True] * len(names)
    assert "| RetNet | float32 | 2 | 101 ± 10.1 |" in new
    assert "| Transformer | 8,192 | 1 | 33.6 ± 3.37 | 3.00 times |" in new
    assert "+0.03 (-0.03 to +0.09)" in new
    assert "MatMulNBits | 30.00 (90.0%)" in new
    assert "retnet-tools bench -d 8192" in new
    assert tables.rewritten(new) == new


def test_a_section_without_records_stays_and_an_unknown_one_is_named(tables: ModuleType) -> None:
    text = "<!-- bench:cpu-decode -->\nas it is\n<!-- /bench:cpu-decode -->"
    assert tables.rewritten(text) == text
    with pytest.raises(SystemExit, match="bench:cpu-other"):
        tables.rewritten("<!-- bench:cpu-other -->\n<!-- /bench:cpu-other -->")


def test_readme_has_markers_of_sections_that_exist(scripts) -> None:
    tables = scripts("readme_tables")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- bench:") == text.count("<!-- /bench:") >= 6
    assert tables.rewritten(text).count("<!-- bench:") == text.count("<!-- bench:")
