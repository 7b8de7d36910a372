"""Quality figures of quantized folders: measured against the float parent, kept in the manifest and the card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from retnet_tools.graph.manifest import read_manifest

FIXTURE = Path(__file__).parents[2] / "fixtures" / "shakespeare"
HELD_OUT = FIXTURE / "heldout.txt"


@pytest.fixture
def folder(tmp_path: Path, cli) -> Path:
    assert cli("export", FIXTURE, "-o", tmp_path / "float").exit_code == 0
    return tmp_path / "float"


def test_the_figures_are_those_of_perplexity(folder: Path, tmp_path: Path, cli) -> None:
    result = cli(
        "quantize",
        folder,
        "--quantize",
        "int4",
        "-o",
        tmp_path / "q",
        "--text",
        HELD_OUT,
        "--text-tokens",
        1500,
        "--json",
    )
    assert result.exit_code == 0
    quality = json.loads(result.out)["quality"]
    measured = json.loads(
        cli("perplexity", tmp_path / "q", "--text", HELD_OUT, "-n", 1500, "--against", folder, "--json").out
    )
    assert quality["tokens"] == measured["text"]["scored_tokens"]
    assert quality["perplexity"] == pytest.approx(measured["model"]["mean_ppl"]["value"], rel=1e-6)
    assert quality["float_perplexity"] == pytest.approx(measured["baseline"]["mean_ppl"]["value"], rel=1e-6)
    assert quality["mean_kl"] == pytest.approx(measured["divergence"]["mean_kld"]["value"], rel=1e-3)
    assert quality["sha256"] == hashlib.sha256(HELD_OUT.read_bytes()).hexdigest()
    record = read_manifest(tmp_path / "q").quantization
    assert record is not None
    assert record.quality is not None
    assert record.quality.mean_kl == quality["mean_kl"]
    card = (tmp_path / "q" / "README.md").read_text(encoding="utf-8")
    assert f"{quality['perplexity']:.4f} | {quality['float_perplexity']:.4f}" in card
    assert "heldout.txt" in card


def test_a_checkpoint_is_the_parent_of_what_export_quantizes(tmp_path: Path, cli) -> None:
    result = cli(
        "export", FIXTURE, "-o", tmp_path / "q", "--quantize", "int8", "--text", HELD_OUT, "--text-tokens", 1500
    )
    assert result.exit_code == 0
    assert "quality       PPL" in result.out
    record = read_manifest(tmp_path / "q").quantization
    assert record is not None
    assert record.quality is not None
    assert 0 < record.quality.mean_kl < 1e-3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--quantize", "fp16", "--text", HELD_OUT], 2, "--text with float16; expected int8 or int4"),
        (["--quantize", "int8", "--text", "missing.txt"], 5, "missing.txt"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    arguments: list[str], code: int, message: str, folder: Path, tmp_path: Path, cli
) -> None:
    result = cli("quantize", folder, "-o", tmp_path / "q", *arguments)
    assert (result.exit_code, result.out) == (code, "")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "q").exists()


def test_a_folder_for_genai_is_not_measured(tmp_path: Path, cli) -> None:
    result = cli("export", FIXTURE, "--to", "genai", "-o", tmp_path / "q", "--quantize", "int8", "--text", HELD_OUT)
    assert result.exit_code == 2
    assert "--text for model.onnx; expected an export of --to onnx" in result.err
    assert not (tmp_path / "q").exists()
