"""The benchmarks of record: their commands are ones that `bench` takes, and README's tables are made of the records."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
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


def quality(perplexity: float, kl: float) -> dict[str, object]:
    return {
        "perplexity": {"value": perplexity, "error": 0.5},
        "float_perplexity": {"value": 36.0, "error": 0.5},
        "mean_kld": {"value": kl, "error": 1e-4},
    }


GOOD = {
    "fp16": quality(36.003, 1e-6),
    **{f"int8 rtn, {size}": quality(36.02, 5e-4) for size in (128, 32)},
    **{f"int4 rtn, {size}": quality(37.5, 2.3e-2) for size in (32, 64, 128)},
    **{f"int4 gptq, {size}": quality(36.8, 1.4e-2) for size in (32, 64, 128)},
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"fp16": quality(36.01, 1e-6)}, ["fp16: perplexity +0.0278% of float32's, allowed 0.0100%"]),
        ({"fp16": quality(35.99, 1e-6)}, ["fp16: perplexity -0.0278% of float32's, allowed 0.0100%"]),
        (
            {"int8 rtn, 32": quality(36.02, 1e-3)},
            ["int8 rtn, 32: mean KL divergence 1.00e-03, allowed less than 1e-03"],
        ),
        (
            {"int4 gptq, 64": quality(37.2, 1.4e-2)},
            ["int4 gptq, 64: perplexity +3.3333% of float32's, allowed 3.0000%"],
        ),
        (
            {"int4 gptq, 128": quality(36.8, 2.2e-2)},
            ["int4 gptq, 128: mean KL divergence 2.20e-02, to nearest 2.30e-02: not clearly below"],
        ),
        ({"int8 rtn, 128": None}, ["int8 rtn, 128: not measured"]),
        ({"int4 rtn, 32": None}, ["int4 rtn, 32: not measured"]),
        ({"fp16": quality(float("nan"), 1e-6)}, ["fp16: perplexity +nan% of float32's, allowed 0.0100%"]),
    ],
)
def test_the_check_of_quality_names_what_is_missed(
    change: dict, expected: list[str], scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = scripts("quantization_quality")
    results = {name: result for name, result in {**GOOD, **change}.items() if result is not None}
    file = tmp_path / "quality.json"
    file.write_text(json.dumps({"results": results}))
    monkeypatch.setattr("sys.argv", ["quantization_quality.py", "--check", "-o", str(file)])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == ("\n".join(expected) or 0)


def test_quality_is_written_after_each_case_beside_what_is_there(
    scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, file = scripts("quantization_quality"), tmp_path / "quality.json"
    before = {"machine": module.machine(), "float32_weights_bytes": 1, "results": {"int8 gptq, 128": 7, "fp16": 1}}
    file.write_text(json.dumps(before))

    def measure(base: Path, out: Path, arguments: list[str], threads: int) -> dict[str, object]:
        if "128" in arguments:
            raise KeyboardInterrupt
        return quality(37.0, 1e-2)

    def export(*arguments: object) -> dict[str, object]:
        Path(arguments[-1]).mkdir()
        (Path(arguments[-1]) / "weights.data").write_bytes(b"1234")
        return {}

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "command", export)
    monkeypatch.setattr("sys.argv", ["quantization_quality.py", "--only", "int4 rtn", "-o", str(file)])
    with pytest.raises(KeyboardInterrupt):
        module.main()
    found = json.loads(file.read_text())
    assert list(found["results"]) == ["fp16", "int4 rtn, 32", "int4 rtn, 64", "int8 gptq, 128"]
    assert (found["results"]["fp16"], found["float32_weights_bytes"]) == (1, 4)
    file.write_text(json.dumps({**before, "machine": {"processor": "another", "cores": 1}}))
    with pytest.raises(SystemExit, match="was measured on"):
        module.main()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [("decode.py", ["--steps", "2"]), ("prefill.py", ["--tokens", "40", "--chunk-sizes", "16", "--quantize", "int4"])],
)
def test_speeds_are_measured_in_turns_with_the_schemes_that_made_them(
    script: str, options: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--size", "base", "--rounds", "1", "--threads", "1"]
    output = tmp_path / "out.json"
    command += ["--folder", str(tmp_path), "-o", str(output), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
    document = json.loads(output.read_text())
    assert document["schemes"]["int4"] == {"bits": 4, "block_size": 64, "symmetric": True, "accuracy_level": 4}
    assert set(document["weight_bytes"]) == {"float32", *document["schemes"]}
    assert len(document["results"]) == 5
    assert all(result.get("ms_per_token", 1) > 0 for result in document["results"])
