"""`retnet-tools quantize`, and `export --quantize`: the folder, the report, and one line for each wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retnet_tools.formats.canonical import write_canonical
from retnet_tools.graph.manifest import read_manifest
from tests.exports import export
from tests.helpers import BASE, random_source

FILES = ["README.md", "decoder.onnx", "prefill.onnx", "retnet.json", "step.onnx", "weights.data"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export(BASE, random_source(BASE, 1), tmp_path / "model")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("word", "ending"), [("int8", "int8"), ("q4", "int4"), ("fp16", "fp16"), ("bf16", "bf16")])
def test_without_o_the_quantized_folder_lies_beside_the_export(word: str, ending: str, folder: Path, cli) -> None:
    result = cli("quantize", folder, "--quantize", word)
    assert result.exit_code == 0
    assert result.err == ""
    assert names(folder.parent) == ["model", f"model-{ending}"]
    assert names(folder.parent / f"model-{ending}") == FILES


def test_bfloat16_for_the_cpu_says_what_will_happen(folder: Path, tmp_path: Path, cli) -> None:
    said = "note: ONNX Runtime has no bfloat16 kernels on the CPU, for which this is built: it runs on CUDA alone"
    assert said in cli("quantize", folder, "--quantize", "bf16").out
    write_canonical(tmp_path / "ckpt", BASE, random_source(BASE, 1))
    assert said in cli("export", tmp_path / "ckpt", "--dtype", "bf16", "--dry-run").out
    assert said not in cli("export", tmp_path / "ckpt", "--dtype", "bf16", "--device", "cuda", "--dry-run").out
    refused = cli("generate", folder.parent / "model-bf16", "-p", "1 2 3", "-n", 2)
    assert (refused.exit_code, "the CPU provider has none for bfloat16" in refused.err) == (4, True)


def test_the_report_says_size_and_scheme(folder: Path, cli) -> None:
    result = cli("quantize", folder, "--quantize", "int4", "--block-size", "32")
    record = read_manifest(folder.parent / "model-int4").quantization
    assert f"{record.weight_bytes / record.float_bytes:.1%} of float32: int4 in blocks of 32, symmetric" in result.out


def test_json_says_what_was_written(folder: Path, tmp_path: Path, cli) -> None:
    arguments = ["--block-size", 32, "--asymmetric", "--accuracy-level", 0, "--method", "rtn"]
    patterns = ["--exclude", "lm_head", "--exclude", "embedding", "--tensor-type", r"layers\.0=int8"]
    result = cli("quantize", folder, "-o", tmp_path / "out", "--quantize", "int4", *arguments, *patterns, "--json")
    document = json.loads(result.out)
    record = read_manifest(tmp_path / "out").quantization
    assert document["quantization"]["scheme"] == json.loads(json.dumps(record.to_dict()))["scheme"]
    assert document["quantization"]["scheme"] == {
        "type": "int4",
        "block_size": 32,
        "symmetric": False,
        "accuracy_level": 0,
        "method": "rtn",
        "exclude": ["lm_head", "embedding"],
        "tensor_types": [{"pattern": "layers\\.0", "type": "int8"}],
    }
    assert document["weight_bytes"] == record.weight_bytes


def test_a_dry_run_writes_nothing(folder: Path, cli) -> None:
    result = cli("quantize", folder, "--quantize", "int4", "--dry-run")
    assert result.exit_code == 0
    assert "would write" in result.out
    assert names(folder.parent) == ["model"]


@pytest.mark.parametrize("kind", ["int8", "int4", "fp16"])
def test_export_and_quantize_in_one_go_writes_the_same_files(kind: str, folder: Path, tmp_path: Path, cli) -> None:
    (tmp_path / "ckpt").mkdir()
    write_canonical(tmp_path / "ckpt" / "model", BASE, random_source(BASE, 1))
    checkpoint = tmp_path / "ckpt" / "model"
    assert cli("export", checkpoint).exit_code == 0
    assert cli("quantize", tmp_path / "ckpt" / "model-onnx", "--quantize", kind, "-o", tmp_path / "two").exit_code == 0
    assert cli("export", checkpoint, "--quantize", kind).exit_code == 0
    one = tmp_path / "ckpt" / f"model-onnx-{kind}"
    assert names(one) == names(tmp_path / "two")
    for name in names(one):
        assert (one / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_inspect_reads_a_quantized_folder(folder: Path, cli) -> None:
    cli("quantize", folder, "--quantize", "int4")
    result = cli("inspect", folder.parent / "model-int4")
    assert result.exit_code == 0
    assert "weights  int4 in blocks of 64, symmetric, rtn, accuracy level 4; " in result.out
    document = json.loads(cli("inspect", folder.parent / "model-int4", "--json").out)
    assert document["export"]["quantization"]["scheme"]["block_size"] == 64
    size = (folder.parent / "model-int4" / "weights.data").stat().st_size
    assert document["export"]["quantization"]["weight_bytes"] == size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantize", "int3"], "--quantize 'int3'; expected one of int8, int4, fp16, bf16"),
        (["--quantize", "itn8"], "did you mean 'int8'?"),
        (["--quantize", "int4", "--block-size", "48"], "block_size is 48; expected one of 32, 64, 128"),
        (["--quantize", "int4", "--accuracy-level", "3"], "accuracy_level is 3; expected one of 0, 1, 4"),
        (["--quantize", "int4", "--method", "awq"], "--method 'awq'; expected one of rtn"),
        (["--quantize", "int4", "--exclude", "norm"], "pattern 'norm' is found in no matrix's name"),
        (["--quantize", "int4", "--exclude", "("], "pattern '('"),
        (["--quantize", "int4", "--tensor-type", "q_proj"], "expected REGEX=int8 or REGEX=int4"),
        (["--quantize", "fp16", "--block-size", "32"], "options of a quantization scheme with fp16"),
        ([], "Missing option '--quantize'"),
    ],
)
def test_usage_errors_end_with_exit_code_2(arguments: list[str], message: str, folder: Path, cli) -> None:
    result = cli("quantize", folder, *arguments)
    assert result.exit_code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert names(folder.parent) == ["model"]


def test_options_of_a_scheme_without_quantize_are_refused_by_export(tmp_path: Path, cli) -> None:
    write_canonical(tmp_path / "ckpt", BASE, random_source(BASE, 1))
    result = cli("export", tmp_path / "ckpt", "--block-size", "32")
    assert result.exit_code == 2
    assert "options of a quantization scheme without --quantize" in result.err


def test_an_existing_output_is_refused_without_force(folder: Path, cli) -> None:
    assert cli("quantize", folder, "--quantize", "int8").exit_code == 0
    result = cli("quantize", folder, "--quantize", "int8")
    assert result.exit_code == 2
    assert "exists already" in result.err
    assert cli("quantize", folder, "--quantize", "int8", "--block-size", 32, "--force").exit_code == 0
    assert read_manifest(folder.parent / "model-int8").quantization.scheme.block_size == 32


def test_an_export_is_not_its_own_output(folder: Path, cli) -> None:
    (folder.parent / "link").symlink_to(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for out in (folder, folder.parent / "link", folder.parent / "model" / ".." / "model"):
        result = cli("quantize", folder, "-o", out, "--quantize", "int8", "--force")
        assert result.exit_code == 2
        assert "is both input and output; expected another output; name one with -o" in result.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_checkpoint_is_not_its_own_output(tmp_path: Path, cli) -> None:
    write_canonical(tmp_path / "ckpt", BASE, random_source(BASE, 1))
    result = cli("export", tmp_path / "ckpt", "-o", tmp_path / "ckpt", "--quantize", "int8", "--force")
    assert result.exit_code == 2
    assert "is both input and output" in result.err
    assert "retnet.json" not in names(tmp_path / "ckpt")


def test_a_float_export_over_a_quantized_one_takes_its_card_away(folder: Path, tmp_path: Path, cli) -> None:
    write_canonical(tmp_path / "ckpt", BASE, random_source(BASE, 1))
    assert cli("quantize", folder, "-o", tmp_path / "out", "--quantize", "int4").exit_code == 0
    assert cli("export", tmp_path / "ckpt", "-o", tmp_path / "out", "--dtype", "fp16", "--force").exit_code == 0
    assert names(tmp_path / "out") == FILES[1:]


def test_somebody_elses_readme_is_not_replaced(folder: Path, tmp_path: Path, cli) -> None:
    out = export(BASE, random_source(BASE, 2), tmp_path / "out")
    (out / "README.md").write_text("mine")
    result = cli("quantize", folder, "-o", out, "--quantize", "int4", "--force")
    assert result.exit_code == 2
    assert "README.md is no card that this command wrote" in result.err
    assert (out / "README.md").read_text() == "mine"


def test_weights_that_float16_cannot_hold_are_told_what_quantize_has(tmp_path: Path, cli) -> None:
    source = random_source(BASE, 1)
    source.tensors["final_norm.weight"][0] = 1e6
    folder = export(BASE, source, tmp_path / "model")
    result = cli("quantize", folder, "--quantize", "fp16")
    assert result.exit_code == 5
    assert "which float16 cannot hold; expected magnitudes up to 65504; use --quantize bf16, or keep" in result.err


def test_quantizing_twice_ends_with_exit_code_5(folder: Path, cli) -> None:
    cli("quantize", folder, "--quantize", "int8")
    result = cli("quantize", folder.parent / "model-int8", "--quantize", "int4")
    assert result.exit_code == 5
    assert "is quantized already (int8)" in result.err
    assert names(folder.parent) == ["model", "model-int8"]


def cut(folder: Path) -> None:
    os.truncate(folder / "weights.data", (folder / "weights.data").stat().st_size - 1)


def drop_a_graph(folder: Path) -> None:
    (folder / "step.onnx").unlink()


def drop_the_manifest(folder: Path) -> None:
    (folder / "retnet.json").unlink()


def spoil_a_weight(folder: Path) -> None:
    data = np.memmap(folder / "weights.data", np.float32, "r+")
    data[np.flatnonzero(data)[-5]] = np.nan


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "as retnet.json says"),
        (drop_a_graph, "step.onnx is missing"),
        (drop_the_manifest, "no retnet.json"),
        (spoil_a_weight, "NaN"),
    ],
)
def test_a_damaged_export_ends_with_exit_code_5(damage, message: str, folder: Path, cli) -> None:
    damage(folder)
    result = cli("quantize", folder, "--quantize", "int4")
    assert result.exit_code == 5
    assert message in result.err
    assert result.err.count("\n") == 1
    assert names(folder.parent) == ["model"]


def test_a_stopped_run_leaves_nothing(folder: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from retnet_tools.cli import app\n"
        "from retnet_tools.graph import export\n"
        f"export.write_graph = lambda *a, **k: os.kill(os.getpid(), {int(signal.SIGTERM)})\n"
        f"sys.argv = ['retnet-tools', 'quantize', {str(folder)!r}, '--quantize', 'int4']\n"
        "app.main()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in result.stderr
    assert names(folder.parent) == ["model"]
