"""`retnet-tools bench`: real numbers on the shipped model, and the provider that was asked for or none."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from retnet_tools.bench.results import BenchRow, Flatness, ModelSummary, StepProfile
from retnet_tools.bench.traffic import retnet_traffic
from retnet_tools.fields import from_json
from retnet_tools.jobs.request import shipped_checkpoint
from retnet_tools.machine import Machine
from tests.bench.inline import measure_inline
from tests.exports import export
from tests.helpers import ABLATIONS, BASE, random_source

QUICK = ("--quick", "-t", 1)
FIXTURE_STATES = 4 * 4 * 64 * 128 * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(BASE, random_source(BASE, 1), tmp_path_factory.mktemp("bench") / "out")


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_inline(monkeypatch)


@pytest.mark.usefixtures("inline")
def test_everything_at_once_on_the_shipped_checkpoint(tmp_path: Path, cli) -> None:
    """The whole command in seconds; the document's schema."""
    picture, scratch = tmp_path / "out.svg", tmp_path / "scratch"
    scratch.mkdir()
    options = ("--against", "torch,transformer,transformer-gqa", "--flat", "--profile", "--plot", picture)
    result = cli("bench", *QUICK, *options, "--folder", scratch, "--json")
    assert result.exit_code == 0, result.err
    assert "using the shipped one" in result.err
    document = json.loads(result.out)
    assert set(document) == {
        *("schema_version", "retnet_tools", "libraries", "model", "machine", "device", "device_name", "rows"),
        *("skipped", "flat", "profile", "options", "quick"),
    }
    assert document["schema_version"] == 3
    assert document["quick"] is document["options"]["quick"] is True
    assert document["options"]["against"] == ["torch", "transformer", "transformer-gqa"]
    rows = [from_json(BenchRow, data) for data in document["rows"]]
    assert [(row.implementation, row.test) for row in rows] == [
        *(("retnet", "pp64"), ("transformer", "pp64"), ("transformer-gqa", "pp64")),
        *(("retnet", "tg16"), ("torch", "tg16"), ("transformer", "tg16"), ("transformer-gqa", "tg16")),
    ]
    for row in rows:
        check(row)
    model = from_json(ModelSummary, document["model"])
    assert model.weight_bytes == pytest.approx(model.weight_bytes_in_file, rel=0.02)
    assert model.state_bytes_per_sequence == FIXTURE_STATES
    from_json(Machine, document["machine"])
    profile = from_json(StepProfile, document["profile"])
    assert 0 < sum(operator.ms for operator in profile.operators) < profile.ms
    positions = document["flat"].pop("positions")
    assert [place["position"] for place in positions] == [1_000, 10_000, 100_000, 1_000_000]
    assert all(place["max_abs"] < 1e-4 for place in positions)
    assert set(document["flat"]) == set(Flatness.__dataclass_fields__) - {"positions"}
    assert (document["skipped"], document["device"]) == ([], "cpu")
    assert picture.stat().st_size > 10_000
    assert list(scratch.iterdir()) == []


def check(row: BenchRow) -> None:
    assert (row.threads, row.device, row.dtype, row.quantization) == (1, "cpu", "float32", None)
    assert row.parameters == pytest.approx(4.19e6, rel=0.02)
    assert len(row.repetitions) == len(row.bandwidths) == len(row.ms_medians) == 3
    assert (row.cuda_graph, row.chunk_size) == (
        None,
        256 if (row.kind, row.implementation) == ("prefill", "retnet") else None,
    )
    assert row.tokens_per_second == pytest.approx(np.mean(row.repetitions))
    assert row.tokens_per_second_std == pytest.approx(np.std(row.repetitions, ddof=1))
    assert 0 < row.ms_per_token_p50 <= row.ms_per_token_p99
    assert 1e8 < row.read_bandwidth < 1e13
    assert 0 < row.floor_share < 100
    assert (row.retnet_speedup is None) == (row.implementation == "retnet")
    if row.kind == "prefill":
        assert row.ms_to_first_token == pytest.approx(64 * row.ms_per_token_p50)
        assert 0 < row.product_share < 2
    elif row.implementation in ("retnet", "torch"):
        # Twice the float16 weights of the checkpoint, as float32, without the embedding; states read and written.
        assert row.bytes_per_token == pytest.approx(2 * 8_391_680 - 4 * 256 * 1024 + 2 * FIXTURE_STATES, rel=0.1)
        assert row.state_bytes_per_sequence == FIXTURE_STATES


@pytest.mark.usefixtures("inline")
def test_batches_depths_and_threads_are_combined(folder: Path, cli) -> None:
    result = cli(
        "bench", folder, "-p", 8, "-n", "4,5", "-d", "0,9", "-b", "1,3", "-t", "1,2", "-r", 1, "--quick", "--json"
    )
    rows = json.loads(result.out)["rows"]
    tests = [(row["threads"], row["test"], row["batch"]) for row in rows]
    assert tests == [
        (threads, f"{name}{depth}", batch)
        for threads in (1, 2)
        for names in (("pp8",), ("tg4", "tg5"))
        for name in names
        for depth in ("", " @ d9")
        for batch in (1, 3)
    ]
    assert all(row["tokens_per_second_std"] is None for row in rows)


@pytest.mark.usefixtures("inline")
def test_rates_agree_with_times(folder: Path, cli) -> None:
    """One step and one prompt of four rows: all times are that of one run, and no longer than the command took."""
    began = time.perf_counter()
    result = cli("bench", folder, "-p", 9, "-n", 1, "-b", 4, "-r", 1, *QUICK, "--json")
    elapsed = time.perf_counter() - began
    prompt, step = json.loads(result.out)["rows"]
    for row in (prompt, step):
        assert row["tokens_per_second"] * row["ms_per_token_p50"] == pytest.approx(4 * 1e3)
        assert row["repetitions"] == [row["tokens_per_second"]]
        assert row["ms_medians"] == [row["ms_per_token_p50"]]
        assert 1e-6 < 4 * row["tokens"] / row["tokens_per_second"] < elapsed
    assert prompt["ms_to_first_token"] == pytest.approx(9 * prompt["ms_per_token_p50"])


@pytest.mark.usefixtures("inline")
def test_a_checkpoint_is_exported_as_it_is_told(cli) -> None:
    result = cli(
        "bench", *QUICK, "-p", 0, "-n", 4, "--quantize", "int8", "--block-size", 32, "--ops", "standard", "--json"
    )
    document = json.loads(result.out)
    assert document["model"]["quantization"] == "int8 in 32s"
    assert document["model"]["ops"] == "standard"
    assert document["model"]["weight_bytes"] == pytest.approx(document["model"]["weight_bytes_in_file"], rel=0.02)
    assert document["rows"][0]["dtype"] == "float32"


@pytest.mark.usefixtures("inline")
def test_a_quantized_export_is_measured_against_a_quantized_transformer(tmp_path: Path, cli) -> None:
    assert cli("export", shipped_checkpoint(), "-o", tmp_path / "out", "--quantize", "int4").exit_code == 0
    result = cli("bench", tmp_path / "out", *QUICK, "-p", 0, "-n", 4, "--against", "transformer", "--flat", "--json")
    document = json.loads(result.out)
    retnet, transformer = document["rows"]
    assert retnet["quantization"] == transformer["quantization"] == "int4 in 64s"
    assert transformer["bytes_per_token"] == pytest.approx(retnet["bytes_per_token"] - 2 * FIXTURE_STATES, rel=0.1)
    # Float weights are gone: there is nothing to judge its logits by.
    assert all(place["max_abs"] is None for place in document["flat"]["positions"])


@pytest.mark.usefixtures("inline")
def test_a_published_size_needs_no_checkpoint(tmp_path: Path, cli) -> None:
    result = cli("bench", "--size", "base", *QUICK, "-p", 0, "-n", 2, "-r", 1, "--folder", tmp_path, "--json")
    document = json.loads(result.out)
    assert document["model"]["name"] == "base"
    assert document["model"]["parameters"] == 2 * 50257 * 512 + 6 * (2 * 512**2 + 6 * 512 * 864 + 2 * 512) + 512
    assert document["rows"][0]["tokens_per_second"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("inline")
def test_tables_markdown_and_csv_have_a_line_for_each_row(folder: Path, cli) -> None:
    options = (folder, "-b", "1,3", "-p", 0, "-n", 2, "-r", 1, *QUICK)
    lines = cli("bench", *options).out.splitlines()
    assert sum(line.startswith("tg2 ") for line in lines) == 2
    assert "fused operators" in lines[0]
    assert sum(line.startswith("| tg2 |") for line in cli("bench", *options, "--format", "md").out.splitlines()) == 2
    rows = list(csv.DictReader(io.StringIO(cli("bench", *options, "--format", "csv").out)))
    assert [row["batch"] for row in rows] == ["1", "3"]


def test_cuda_where_there_is_none_ends_with_exit_code_4_before_any_work(monkeypatch, cli) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    result = cli("bench", "--device", "cuda", "--size", "13b")
    assert (result.exit_code, result.out) == (4, "")
    assert "no CUDA provider" in result.err
    assert result.err.count("\n") == 1


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(tmp_path: Path, monkeypatch, cli) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    result = cli("bench", "--size", "1.3b", "--against", "transformer", "--folder", tmp_path)
    assert result.exit_code == 1
    assert "1.00 GB free in" in result.err
    assert "expected 11.4" in result.err
    assert "--folder" in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("-b", "0"),
        ("-b", "1,x"),
        ("-p", "-1"),
        ("-t", "100000"),
        ("-r", 0),
        ("-p", "0", "-n", "0"),
        ("--chunk-size", "0"),
        ("--device", "tpu"),
        ("--size", "1.4b"),
        ("--against", "transformers"),
        ("--quantize", "int3"),
        ("--block-size", "32"),
        ("--format", "xml"),
        ("--plot", "out.bmp"),
        ("--flat", "-r", "1"),
        ("--folder", os.devnull),
        ("-d", "16777215"),
    ],
)
def test_wrong_options_are_refused(arguments: tuple[object, ...], cli) -> None:
    result = cli("bench", *arguments)
    assert (result.exit_code, result.out) == (2, "")
    assert result.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.err


@pytest.mark.parametrize(("option", "value"), [("--dtype", "fp16"), ("--ops", "standard"), ("--size", "base")])
def test_an_export_has_its_types_already(option: str, value: str, folder: Path, cli) -> None:
    result = cli("bench", folder, option, value)
    assert (result.exit_code, result.out) == (2, "")
    assert option in result.err


def test_a_stack_without_a_vocabulary_is_refused(tmp_path: Path, cli) -> None:
    stack = export(ABLATIONS["stack"], random_source(ABLATIONS["stack"], 1), tmp_path / "out")
    result = cli("bench", stack, *QUICK)
    assert (result.exit_code, result.out) == (2, "")
    assert "stack without embedding and head" in result.err


@pytest.mark.usefixtures("inline")
def test_results_are_printed_before_a_plot_that_fails(tmp_path: Path, folder: Path, monkeypatch, cli) -> None:
    from retnet_tools.bench import plot
    from retnet_tools.errors import OutputError

    def fail(*arguments: object, **options: object) -> None:
        raise OutputError("cannot write it")

    monkeypatch.setattr(plot, "save_figure", fail)
    result = cli("bench", folder, "-p", 0, "-n", 1, "-r", 1, *QUICK, "--json", "--plot", tmp_path / "out.svg")
    assert (result.exit_code, result.err) == (1, "error: cannot write it\n")
    assert len(json.loads(result.out)["rows"]) == 1


@pytest.mark.usefixtures("inline")
def test_the_chunk_size_is_that_of_the_rows(folder: Path, cli) -> None:
    result = cli("bench", folder, "-p", 9, "-n", 1, "-r", 1, *QUICK, "--chunk-size", 4, "--json")
    prompt, step = json.loads(result.out)["rows"]
    assert (prompt["chunk_size"], step["chunk_size"]) == (4, None)
    # Three chunks of 4, 4 and 1 tokens read the weights three times.
    weights = retnet_traffic(BASE, "float32", None, "float32", 4).weight_bytes
    assert 3 * weights / 9 < prompt["bytes_per_token"] < 3.5 * weights / 9


def test_memory_of_a_sequence_is_measured_over_batches(folder: Path, cli) -> None:
    result = cli("bench", folder, "-p", 0, "-n", 1, "-r", 1, "-b", "1,4000,8000", *QUICK, "--json")
    assert result.exit_code == 0, result.err
    rows = json.loads(result.out)["rows"]
    if rows[0]["peak_resident_bytes"] is None:
        pytest.skip("the kernel keeps no peak to reset")
    states = rows[0]["state_bytes_per_sequence"]
    assert states == 2 * 4 * 8 * 12 * 4
    for row in rows:
        assert states < row["memory_per_sequence"] < states + 4 * 61 + 40_000


def test_a_mixed_model_is_not_compared_with_a_transformer(tmp_path: Path, cli) -> None:
    assert (
        cli("export", shipped_checkpoint(), "-o", tmp_path / "out", "--quantize", "int4", "--exclude", "ffn").exit_code
        == 0
    )
    result = cli("bench", tmp_path / "out", *QUICK, "--against", "transformer")
    assert (result.exit_code, result.out) == (2, "")
    assert "--against transformer for int4 in 64s, mixed weights" in result.err
    assert result.err.count("\n") == 1
