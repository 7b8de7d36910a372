"""`retnet-tools convert`: formats, types, shards, dry runs and refusals."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from retnet_tools.formats import open_checkpoint
from retnet_tools.formats.canonical import write_canonical
from tests.formats.cases import CONFORMANCE
from tests.helpers import ABLATIONS, BASE, random_source

TORCHSCALE = CONFORMANCE / "ts_base_gelu" / "model_bare.pt"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "in"
    write_canonical(path, BASE, random_source(BASE, 1))
    return path


def test_a_torchscale_file_becomes_a_canonical_folder(tmp_path: Path, cli) -> None:
    result = cli("convert", TORCHSCALE, tmp_path / "out")
    assert result.exit_code == 0
    assert result.err == ""
    assert "torchscale (since October 2023)" in result.out
    assert open_checkpoint(tmp_path / "out").config == open_checkpoint(TORCHSCALE).config


def test_shards_and_types_are_chosen(checkpoint: Path, tmp_path: Path, cli) -> None:
    result = cli("convert", checkpoint, tmp_path / "out", "--dtype", "bf16", "--max-shard-size", "20KB", "--json")
    document = json.loads(result.out)
    assert document["schema_version"] == 1
    assert len(document["files"]) > 2
    assert all(size <= 20_000 for size in document["files"].values())
    assert {tensor["dtype"] for tensor in document["tensors"]} == {"bfloat16"}
    weights = open_checkpoint(tmp_path / "out").weights
    assert sum(weights.info(name).nbytes for name in weights.names()) == document["tensor_bytes"]


def test_a_dry_run_shows_names_sizes_and_memory_and_writes_nothing(checkpoint: Path, tmp_path: Path, cli) -> None:
    result = cli("convert", checkpoint, tmp_path / "out", "--to", "torchscale", "--dry-run")
    assert result.exit_code == 0
    assert "layers.1.ffn.fc1.weight" in result.out
    assert "layers.1.ffn.gate_proj.weight" in result.out
    assert "memory" in result.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "torchscal"], "did you mean 'torchscale'?"),
        (["--dtype", "int8"], "dtype 'int8'"),
        (["--max-shard-size", "five"], "size 'five'"),
        (["--max-shard-size", "0"], "size '0'"),
        (["--from", "hugging"], "unknown format 'hugging'"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, checkpoint: Path, tmp_path: Path, cli) -> None:
    result = cli("convert", checkpoint, tmp_path / "out", *arguments)
    assert (result.exit_code, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_a_format_cannot_express_is_refused_by_field(tmp_path: Path, cli) -> None:
    write_canonical(tmp_path / "in", ABLATIONS["no_gate"], random_source(ABLATIONS["no_gate"], 1))
    result = cli("convert", tmp_path / "in", tmp_path / "out", "--to", "torchscale")
    assert result.exit_code == 2
    assert "torchscale cannot express: gate = None" in result.err
    assert not (tmp_path / "out").exists()


def test_an_existing_checkpoint_is_replaced_only_by_force(checkpoint: Path, tmp_path: Path, cli) -> None:
    assert cli("convert", checkpoint, tmp_path / "out").exit_code == 0
    refused = cli("convert", checkpoint, tmp_path / "out")
    assert refused.exit_code == 2
    assert "--force" in refused.err
    assert cli("convert", checkpoint, tmp_path / "out", "--force").exit_code == 0


def test_a_full_disk_is_one_line_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    def no_file_above_16_kilobytes() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))

    command = [sys.executable, "-m", "retnet_tools.cli.app", "convert", str(checkpoint), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=no_file_above_16_kilobytes)
    assert result.returncode == 1
    assert "a file of it is larger than the file system or a limit of this process allows" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
