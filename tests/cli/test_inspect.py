"""`retnet-tools inspect`: text and JSON for checkpoints and exports, exit codes, and one line for each wrong input."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from retnet_tools.formats.canonical import write_canonical
from retnet_tools.jobs.request import shipped_checkpoint
from tests.exports import export
from tests.formats.cases import SETTINGS, small_tensors, write_torchscale
from tests.helpers import BASE, PEAK_RESIDENT, random_source


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "ckpt"
    write_canonical(path, BASE, random_source(BASE, 1))
    return path


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    source = random_source(BASE, 1)
    source.tensors["final_norm.weight"][0] = np.nan
    path = tmp_path / "damaged"
    write_canonical(path, BASE, source)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export(BASE, random_source(BASE, 1), tmp_path / "out")


def test_a_checkpoint_in_text(checkpoint: Path, cli) -> None:
    result = cli("inspect", checkpoint)
    assert result.exit_code == 0
    assert result.err == ""
    for words in ("retnet-tools 1", "vocab_size", "0.9921875", "retention projections", "lint: nothing found"):
        assert words in result.out


def test_json_holds_what_each_head_remembers(checkpoint: Path, cli) -> None:
    document = json.loads(cli("inspect", checkpoint, "--json").out)
    assert document["schema_version"] == 1
    assert document["format"] == "retnet-tools 1"
    assert document["config"] == BASE.to_dict()
    assert document["state"]["bytes_per_sequence"] == 2 * document["state"]["bytes_per_layer"] == 2 * 4 * 8 * 12 * 4
    for h, head in enumerate(document["heads"]):
        gamma = 1 - 2.0 ** (-5 - h)
        assert head["gamma"] == pytest.approx(gamma, rel=1e-15)
        assert head["half_life"] == pytest.approx(math.log(0.5, gamma), rel=1e-12)
        assert head["horizon_1_percent"] == pytest.approx(math.log(0.01, gamma), rel=1e-12)


def test_an_endless_memory_is_null_in_json_and_never_in_text(tmp_path: Path, cli) -> None:
    config = replace(BASE, decay=(*BASE.decay[:3], 0.0))
    write_canonical(tmp_path / "ckpt", config, random_source(config, 1))
    head = json.loads(cli("inspect", tmp_path / "ckpt", "--json").out)["heads"][3]
    assert (head["gamma"], head["half_life"], head["horizon_1_percent"]) == (1.0, None, None)
    assert "never" in cli("inspect", tmp_path / "ckpt").out


def test_an_exported_folder(folder: Path, cli) -> None:
    result = cli("inspect", folder)
    assert result.exit_code == 0
    assert "step.onnx: " in result.out
    assert "com.microsoft.LinearAttention" in result.out
    assert json.loads(cli("inspect", folder, "--json").out)["kind"] == "export"


def test_findings_do_not_fail_unless_strict(checkpoint: Path, damaged: Path, cli) -> None:
    result = cli("inspect", damaged)
    assert result.exit_code == 0
    assert "error nan: 1 value NaN in final_norm.weight" in result.out
    result = cli("inspect", damaged, "--strict", "--json")
    assert result.exit_code == 1
    assert json.loads(result.out)["lint"]["counts"] == {"error": 1, "warning": 0, "info": 0}
    assert result.err.count("\n") == 1
    assert cli("inspect", checkpoint, "--strict").exit_code == 0


@pytest.mark.parametrize("option", ["--quick", "--no-data"])
def test_quick_does_not_look_at_data(option: str, damaged: Path, cli) -> None:
    result = cli("inspect", damaged, option, "--strict")
    assert result.exit_code == 0
    assert "no tensor data read" in result.out


def test_the_shipped_checkpoint_is_clean(cli) -> None:
    assert cli("inspect", shipped_checkpoint(), "--strict").exit_code == 0


@pytest.mark.parametrize("command", ["inspect", "export", "perplexity", "convert", "quantize"])
def test_a_command_without_a_model_says_what_to_name(command: str, cli) -> None:
    result = cli(command)
    assert (result.exit_code, result.out, result.err.count("\n")) == (2, "", 1)
    assert "folder" in result.err


def test_a_torchscale_checkpoint_with_its_release_and_notes(tmp_path: Path, cli) -> None:
    write_torchscale(tmp_path / "ts")
    document = json.loads(cli("inspect", tmp_path / "ts", "--json").out)
    assert document["format"].startswith("torchscale")
    settings = {key: value for key, value in SETTINGS.items() if key != "torchscale_version"}
    write_torchscale(tmp_path / "old", settings=settings)
    assert "note: these files do not tell which clamp" in cli("inspect", tmp_path / "old").out


def test_a_vocabulary_that_does_not_match_the_embedding_ends_with_exit_code_5(tmp_path: Path, cli) -> None:
    write_torchscale(tmp_path / "ts", small_tensors(), SETTINGS | {"vocab_size": 9})
    result = cli("inspect", tmp_path / "ts")
    assert result.exit_code == 5
    assert "7 rows" in result.err


def remove_weights(folder: Path) -> None:
    (folder / "weights.data").unlink()


def cut_weights(folder: Path) -> None:
    os.truncate(folder / "weights.data", 5000)


def remove_graph(folder: Path) -> None:
    (folder / "step.onnx").unlink()


def break_manifest(folder: Path) -> None:
    (folder / "retnet.json").write_text("{}")


@pytest.mark.parametrize("quick", [(), ("--quick",)])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_weights, "weights.data is missing"),
        (cut_weights, "5000 bytes; expected"),
        (remove_graph, "step.onnx is missing"),
        (break_manifest, "retnet.json"),
    ],
)
def test_a_damaged_export_ends_with_exit_code_5(damage, message: str, quick, folder: Path, cli) -> None:
    damage(folder)
    result = cli("inspect", folder, *quick)
    assert result.exit_code == 5
    assert result.out == ""
    assert message in result.err
    assert result.err.count("\n") == 1


def test_a_damaged_or_missing_checkpoint_ends_with_exit_code_5(checkpoint: Path, tmp_path: Path, cli) -> None:
    assert cli("inspect", tmp_path / "nothing").exit_code == 5
    tensors = random_source(BASE, 1).tensors
    del tensors["final_norm.weight"]
    save_file(tensors, checkpoint / "model.safetensors")
    result = cli("inspect", checkpoint)
    assert result.exit_code == 5
    assert "final_norm.weight" in result.err


def test_an_unknown_format_ends_with_exit_code_2(checkpoint: Path, cli) -> None:
    result = cli("inspect", checkpoint, "--from", "torchscal")
    assert result.exit_code == 2
    assert "did you mean 'torchscale'?" in result.err


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """Nine matrices of 16 MB, in a checkpoint and in an export: one of them at a time."""
    config = replace(BASE, hidden_size=1024, feed_forward=replace(BASE.feed_forward, dim=4096), num_layers=3)
    source = random_source(config, 1)
    write_canonical(tmp_path / "ckpt", config, source)
    export(config, source, tmp_path / "out")
    script = (
        f"{PEAK_RESIDENT}"
        "import sys\n"
        "from pathlib import Path\n"
        "from retnet_tools.jobs.inspect import InspectRequest, inspect_model, open_model\n"
        "from retnet_tools.formats import CheckpointSource\n"
        "model = open_model(CheckpointSource(Path(sys.argv[1])))\n"
        "before = peak_resident()\n"
        "result = inspect_model(InspectRequest(sys.argv[1]), model)\n"
        "print(sum(result.bytes_by_dtype.values()), peak_resident() - before)\n"
    )
    for name, largest in (("ckpt", 1), ("out", 2)):  # an export merges gate and up
        command = [sys.executable, "-c", script, str(tmp_path / name)]
        stored, grown = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        assert stored > 9 * 2**24
        # Beside it what the allocator keeps of the one before, and a megabyte of the interpreter's own.
        assert grown < largest * 2**24 + 2**24 + 2**20
