"""The benchmarks of record: their commands are ones it takes, and docs/benchmarks.md has the tables of the records."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import typer

from retnet_tools.bench.options import Case
from retnet_tools.bench.results import benchmark_document
from retnet_tools.cli.app import app
from retnet_tools.cli.bench import bench_options
from tests.bench.reports import GRID, report, row

ROOT = Path(__file__).parent.parent


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
        options = bench_options(*(found[name] for name in names), quick=False, flat=found["flat"])
        assert found["size"] in ("1.3b", "6.7b")
        # Of two, nobody can say which one deviates.
        assert options.repetitions >= 3


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "bench").glob("*.json")), ids=lambda path: path.stem)
def test_no_record_is_faster_than_its_limit(path: Path) -> None:
    """What is, was held to a limit that something disturbed; a share is of what the machine does at best."""
    for found in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        assert (found["product_share"] or 0) < 1, found["test"]
        assert (found["floor_share"] or 0) < 1, found["test"]


def document(*, flat: bool = False, **changes: object) -> dict[str, object]:
    rows = [row("retnet", Case("prefill", 64, 0, 1)), *GRID, row("retnet", Case("decode", 8, 8192, 1))]
    rows.append(row("transformer", Case("decode", 8, 8192, 1), seconds=0.03))
    found = json.loads(json.dumps(benchmark_document(report(rows, flat=flat, profile=True))))
    record = {"command": "retnet-tools bench -d 8192", "recorded": "2026-11-24", "noisy": [], "modified": False}
    return record | found | changes


@pytest.fixture
def tables(scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = scripts("docs_tables")
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def section(tables: ModuleType, name: str) -> str:
    return tables.rewritten(f"<!-- bench:{name} -->\nold\n<!-- /bench:{name} -->")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_section_is_made_of_its_records(device: str, tables: ModuleType, tmp_path: Path) -> None:
    for name in ("float32", "transformer", "context"):
        (tmp_path / f"{device}-{name}.json").write_text(json.dumps(document()))
    (tmp_path / f"{device}-flat.json").write_text(json.dumps(document(flat=True)))
    names = ("decode", "prefill", "transformer", "context", "flat", "operators")
    old = "".join(f"before {n}\n<!-- bench:{device}-{n} -->\nold\n<!-- /bench:{device}-{n} -->\n" for n in names)
    new = tables.rewritten(old)
    assert "old" not in new
    assert [f"before {n}" in new for n in names] == [True] * len(names)
    assert "| RetNet | float32 | 2 | 101 ± 10.1 |" in new
    assert "| Transformer | 8,192 | 1 | 33.6 ± 3.37 | 3.00 times |" in new
    assert "GB a sequence, computed" in new
    assert "+0.03 (-0.03 to +0.09) | 0.9%" in new
    assert "3.0e-05 / 4.0e-05 / 5.0e-05 / 6.0e-05 | 12 |" in new
    assert "MatMulNBits | 30.00 (75.0%)" in new
    assert "outside operators | 9.00 (22.5%)" in new
    assert "| int8 in 128s, float32 activations |" in new
    assert "retnet-tools bench -d 8192" in new
    assert ("GB/s copied" in new) == (device == "cuda")
    assert tables.rewritten(new) == new


def test_every_machine_is_named_with_its_commands(tables: ModuleType, tmp_path: Path) -> None:
    other = {"processor": "Another", "cores": 8, "memory_bytes": None, "system": "Linux 6"}
    (tmp_path / "cpu-float32.json").write_text(json.dumps(document(command="bench a")))
    (tmp_path / "cpu-int8.json").write_text(json.dumps(document(command="bench b", machine=other)))
    (tmp_path / "cpu-int4.json").write_text(json.dumps(document(command="bench c", recorded="2026-11-25")))
    text = section(tables, "cpu-decode")
    assert "Some processor, 2 cores, 24 GiB; 2026-11-24 and 2026-11-25:\n\n```\nbench a\nbench c\n```" in text
    assert "Another, 8 cores; 2026-11-24:\n\n```\nbench b\n```" in text


def test_what_was_not_measured_is_named_with_its_reason(tables: ModuleType, tmp_path: Path) -> None:
    skips = [
        ("tg8 @ d512", 64, "it needs 2.5 GB, and 1.0 GB are free", 0),
        ("tg8 @ d2048", 8, "it needs 9.1 GB, and 1.0 GB are free", 0),
        ("tg8", 1, "no such kernel", 2),
    ]
    keys = ("test", "batch", "reason", "repetitions")
    found = [{"implementation": "transformer", "threads": 2, **dict(zip(keys, skip, strict=True))} for skip in skips]
    (tmp_path / "cpu-context.json").write_text(json.dumps(document(skipped=found)))
    assert (
        "Transformer, tg8 @ d512, batch 64: it needs 2.5 GB, and 1.0 GB are free (likewise tg8 @ d2048, batch 8). "
        "Transformer, tg8, batch 1 after 2 repetitions: no such kernel."
    ) in section(tables, "cpu-context")


def test_noise_and_changes_are_said(tables: ModuleType, tmp_path: Path) -> None:
    assert "No run on a quiet machine has been recorded yet." in section(tables, "recorded")
    (tmp_path / "cpu-int8.json").write_text(json.dumps(document(noisy=["retnet tg8: 7.0%"], modified=True)))
    text = section(tables, "cpu-decode")
    assert "Deviating by more than 5% of the mean: retnet tg8: 7.0%." in text
    assert "changes that are not in the recorded commit" in text
    rows = len(document()["rows"])
    assert f"Recorded 2026-11-24: {rows} rows, of which 1 deviate" in section(tables, "recorded")


def test_a_record_of_another_version_is_refused(tables: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "cpu-int8.json").write_text(json.dumps(document(schema_version=2)))
    with pytest.raises(SystemExit, match=r"cpu-int8\.json has schema version 2, not 3"):
        section(tables, "cpu-decode")


def test_torchscale_is_a_section_with_its_machine(
    tables: ModuleType, scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = scripts("torchscale_step")
    # Of each implementation in turns; the second of int8 deviates, and is made again by both.
    turns = {step.OFFICIAL: [290.0, 300.0, 310.0, 300.0], "int8": [29.0, 25.0, 31.0, 28.0]}

    class Worker:
        def __init__(self, name: str, spec: object) -> None:
            self._name = name

        def __enter__(self) -> Worker:
            return self

        def __exit__(self, *_: object) -> None: ...

        def call(self, method: str, test: Case) -> SimpleNamespace:
            return SimpleNamespace(seconds=[turns[self._name].pop(0) / 1e3])

    monkeypatch.setattr(step, "Worker", Worker)
    monkeypatch.setattr(step, "KINDS", ("int8",))
    monkeypatch.setattr(step, "write_exports", lambda *_: {})
    arguments = SimpleNamespace(size="1.3b", threads=2, depth=512, steps=1, repetitions=3)
    record = {
        "command": "python benchmarks/torchscale_step.py",
        "recorded": "2026-11-24",
        "machine": document()["machine"],
        "libraries": {"torch": "2.9"},
        **step.measure(arguments, tmp_path / "exports"),
    }
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "torchscale_step.json").write_text(json.dumps(record))
    text = section(tables, "cpu-official")
    assert "| torchscale 0.3.0, float32 | 300 ± 10 | 1.00 |" in text
    assert "| int8 | 29 ± 1.53 | 10.00 |" in text
    assert "off by more than 10%: repetition 2 of all." in text
    assert "torch 2.9. Some processor, 2 cores, 24 GiB; 2026-11-24:" in text
    assert "\nold\n" in section(tables, "cuda-official")


def test_check_says_whether_the_page_is_what_the_records_say(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "benchmarks.md"
    old = "<!-- bench:cpu-decode -->\nold\n<!-- /bench:cpu-decode -->"
    page.write_text(old)
    (tmp_path / "cpu-int8.json").write_text(json.dumps(document()))

    def run(*arguments: str) -> object:
        monkeypatch.setattr("sys.argv", ["docs_tables.py", *arguments])
        try:
            return tables.main()
        except SystemExit as stop:
            return stop.code

    assert run("--check") == "docs/benchmarks.md is not what benchmarks/bench/ says: run benchmarks/docs_tables.py"
    assert page.read_text() == old
    assert run() is None
    assert "| RetNet | float32 |" in page.read_text()
    assert run("--check") == 0


def test_pictures_are_drawn_of_the_records(tables: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "cpu-context.json").write_text(json.dumps(document()))
    (tmp_path / "cpu-flat.json").write_text(json.dumps(document(flat=True)))
    (tmp_path / "cpu-int8.json").write_text(json.dumps(document()))
    tables.draw_pictures()
    drawn = {file.name: file.read_bytes() for file in tmp_path.glob("*.svg")}
    assert set(drawn) == {"cpu-context.svg", "cpu-flat.svg"}
    tables.draw_pictures()
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.svg")} == drawn
    assert "(../benchmarks/bench/cpu-flat.svg)" in section(tables, "cpu-flat")


def test_rows_that_vary_are_noisy(scripts) -> None:
    rows = [
        {"implementation": "retnet", "test": "tg8", "batch": 1, "threads": None, "tokens_per_second": 100.0} | changes
        for changes in ({"tokens_per_second_std": 5.1}, {"tokens_per_second_std": 4.9}, {"tokens_per_second_std": None})
    ]
    assert scripts("record").noisy(rows) == ["retnet tg8, batch 1, all threads: 5.1%"]


def test_a_record_says_what_was_measured(scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = scripts("record")
    for command in ("init -q", "config user.email a@b", "config user.name a", "commit -q --allow-empty -m one"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "FOLDER", tmp_path / "benchmarks" / "bench")
    record.FOLDER.mkdir(parents=True)
    (tmp_path / "retnet_tools" / "cli").mkdir(parents=True)
    for folder in (tmp_path / "retnet_tools", tmp_path / "retnet_tools" / "cli"):
        (folder / "__init__.py").write_text("")
    rows = [{"implementation": "retnet", "test": "tg8", "batch": 1, "threads": 2}]
    rows[0] |= {"tokens_per_second": 100.0, "tokens_per_second_std": 9.0}
    (tmp_path / "retnet_tools" / "cli" / "app.py").write_text(f"print('''{json.dumps({'rows': rows})}''')")
    assert record.tree()["modified"] is True
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    subprocess.run(["git", "commit", "-q", "-m", "two"], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert record.record(record.Run("int8", "--size {size}"), "cpu", "1.3b", None, "")
    found = json.loads((record.FOLDER / "cpu-int8.json").read_text())
    # The package of this tree ran, not one that is installed; its own record is no change.
    assert (found["rows"], found["commit"], found["modified"]) == (rows, head.stdout.strip(), False)
    assert found["noisy"] == ["retnet tg8, batch 1, 2 threads: 9.0%"]
    assert found["command"] == "retnet-tools bench --size 1.3b"
    assert record.tree()["modified"] is False


def test_a_section_without_records_stays_and_an_unknown_one_is_named(tables: ModuleType) -> None:
    text = "<!-- bench:cpu-decode -->\nas it is\n<!-- /bench:cpu-decode -->"
    assert tables.rewritten(text) == text
    with pytest.raises(SystemExit, match="bench:cpu-other"):
        tables.rewritten("<!-- bench:cpu-other -->\n<!-- /bench:cpu-other -->")


def test_the_page_has_markers_of_sections_that_exist(scripts) -> None:
    tables = scripts("docs_tables")
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert text.count("<!-- bench:") == text.count("<!-- /bench:") >= 6
    assert tables.rewritten(text).count("<!-- bench:") == text.count("<!-- bench:")


def test_steps_without_cuda_graphs_are_called_so(tables: ModuleType, tmp_path: Path) -> None:
    found = document()
    found["rows"][-2]["cuda_graph"] = False
    (tmp_path / "cuda-float16-eager.json").write_text(json.dumps(found))
    assert section(tables, "cuda-decode").count("| RetNet, kernel by kernel | float32 |") == 1


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
