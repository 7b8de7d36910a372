"""`retnet-tools export`: the folder, the report, and one line with an exit code for each wrong input."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from retnet_tools.formats.canonical import write_canonical
from tests.helpers import BASE, random_source

FILES = ["decoder.onnx", "prefill.onnx", "retnet.json", "step.onnx", "weights.data"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "ckpt"
    write_canonical(path, BASE, random_source(BASE, 1))
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_without_o_the_export_lies_beside_the_checkpoint(checkpoint: Path, cli) -> None:
    result = cli("export", checkpoint, "--to", "onnx")
    assert result.exit_code == 0
    assert names(checkpoint.parent) == ["ckpt", "ckpt-onnx"]
    assert names(checkpoint.parent / "ckpt-onnx") == FILES
    assert result.err == ""
    assert "prefill.onnx" in result.out
    assert "step.onnx" in result.out


@pytest.mark.parametrize("dtype", ["fp32", "f16", "float16", "bf16"])
@pytest.mark.parametrize("ops", ["fused", "standard"])
def test_json_says_what_was_written(dtype: str, ops: str, checkpoint: Path, tmp_path: Path, cli) -> None:
    result = cli("export", checkpoint, "-o", tmp_path / "out", "--dtype", dtype, "--ops", ops, "--json")
    document = json.loads(result.out)
    assert document["schema_version"] == 1
    assert document["written"] is True
    assert document["ops"] == ops
    assert document["dtype"] == {"f": "float", "b": "bfloat"}[dtype[0]] + ("32" if dtype == "fp32" else "16")
    assert document["state_bytes_per_sequence"] == 2 * 4 * 8 * 12 * 4
    assert abs(document["weight_bytes"] - (tmp_path / "out" / "weights.data").stat().st_size) < 4096 * 40


def test_for_genai_there_is_one_graph_and_its_configuration(checkpoint: Path, cli) -> None:
    result = cli("export", checkpoint, "--to", "genai")
    assert result.exit_code == 0
    out = checkpoint.parent / "ckpt-genai"
    assert names(out) == ["genai_config.json", "model.onnx", "retnet.json", "weights.data"]
    assert "settings      genai_config.json" in result.out
    assert "note: no tokenizer.json: onnxruntime-genai can run token ids only" in result.out
    assert "model.onnx: " in cli("inspect", out).out


def test_states_may_be_float16(checkpoint: Path, tmp_path: Path, cli) -> None:
    result = cli("export", checkpoint, "-o", tmp_path / "out", "--state-dtype", "fp16", "--json")
    document = json.loads(result.out)
    assert (document["dtype"], document["state_dtype"]) == ("float32", "float16")
    assert document["state_bytes_per_sequence"] == 2 * 4 * 8 * 12 * 2
    manifest = json.loads((tmp_path / "out" / "retnet.json").read_text())
    assert manifest["state_scale"] == [2.0**-5, 2.0**-6, 2.0**-7, 2.0**-8]
    assert manifest["graphs"]["step.onnx"]["outputs"][1]["dtype"] == "float16"


def test_a_dry_run_writes_nothing(checkpoint: Path, cli) -> None:
    result = cli("export", checkpoint, "--dry-run")
    assert result.exit_code == 0
    assert "would write" in result.out
    assert names(checkpoint.parent) == ["ckpt"]


def test_tokenizer_files_travel(checkpoint: Path, tmp_path: Path, cli) -> None:
    Tokenizer(models.WordLevel({"to": 0}, unk_token="to")).save(str(checkpoint / "tokenizer.json"))
    assert cli("export", checkpoint, "-o", tmp_path / "out").exit_code == 0
    assert names(tmp_path / "out") == sorted([*FILES, "tokenizer.json"])
    assert json.loads((tmp_path / "out" / "retnet.json").read_text())["tokenizer_files"] == ["tokenizer.json"]


def drop_a_tensor(path: Path) -> None:
    source = random_source(BASE, 1)
    del source.tensors["layers.1.ffn_norm.weight"]
    _rewrite(path, source.tensors)


def add_a_tensor(path: Path) -> None:
    _rewrite(path, {**random_source(BASE, 1).tensors, "extra.weight": np.zeros(3, np.float32)})


def change_a_shape(path: Path) -> None:
    _rewrite(path, {**random_source(BASE, 1).tensors, "final_norm.weight": np.ones(7, np.float32)})


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def remove_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def break_config(path: Path) -> None:
    (path / "config.json").write_text((path / "config.json").read_text().replace('"num_heads": 4', '"num_heads": 5'))


def _rewrite(path: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_a_tensor, "layers.1.ffn_norm.weight"),
        (add_a_tensor, "extra.weight"),
        (change_a_shape, "final_norm.weight"),
        (truncate, "model.safetensors"),
        (remove_weights, "ckpt"),
        (break_config, "5 heads"),
    ],
)
def test_a_damaged_checkpoint_ends_with_exit_code_5(damage, message: str, checkpoint: Path, cli) -> None:
    damage(checkpoint)
    result = cli("export", checkpoint)
    assert result.exit_code == 5
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert message in result.err
    assert names(checkpoint.parent) == ["ckpt"]


def test_usage_errors_end_with_exit_code_2(checkpoint: Path, tmp_path: Path, cli) -> None:
    for arguments, message in [
        (("--to", "onix"), "'onix'; expected one of onnx, genai; did you mean 'onnx'?"),
        (("--dtype", "int8"), "dtype 'int8'"),
        (("--state-dtype", "bf16"), "dtype 'bf16'"),
        (("--ops", "fuzed"), "did you mean 'fused'?"),
        (("--from", "torchscal"), "did you mean 'torchscale'?"),
    ]:
        result = cli("export", checkpoint, *arguments)
        assert result.exit_code == 2
        assert message in result.err
        assert names(tmp_path) == ["ckpt"]


def test_an_existing_output_is_refused_before_reading(checkpoint: Path, cli) -> None:
    assert cli("export", checkpoint).exit_code == 0
    result = cli("export", checkpoint)
    assert result.exit_code == 2
    assert "exists already" in result.err
    assert cli("export", checkpoint, "--force").exit_code == 0


def test_a_missing_checkpoint_ends_with_exit_code_5(tmp_path: Path, cli) -> None:
    result = cli("export", tmp_path / "nothing")
    assert result.exit_code == 5
    assert str(tmp_path / "nothing") in result.err
    assert result.err.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "retnet_tools.cli.app", "export", str(tmp_path / "nothing")]
    quiet = subprocess.run(command, capture_output=True, text=True)
    loud = subprocess.run([*command, "--debug"], capture_output=True, text=True)
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in loud.stderr


def test_a_disk_that_fills_up_leaves_nothing(checkpoint: Path) -> None:
    def no_file_above_16_kilobytes() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))

    command = [sys.executable, "-m", "retnet_tools.cli.app", "export", str(checkpoint)]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=no_file_above_16_kilobytes)
    assert result.returncode == 1
    assert "a file of it is larger than the file system or a limit of this process allows" in result.stderr
    assert result.stderr.count("\n") == 1
    assert names(checkpoint.parent) == ["ckpt"]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_export_leaves_nothing(stop: signal.Signals, checkpoint: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from retnet_tools.cli import app\n"
        "from retnet_tools.graph import export\n"
        f"export.write_graph = lambda *a, **k: os.kill(os.getpid(), {int(stop)})\n"
        f"sys.argv = ['retnet-tools', 'export', {str(checkpoint)!r}]\n"
        "app.main()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 128 + stop
    assert "Traceback" not in result.stderr
    assert names(checkpoint.parent) == ["ckpt"]
