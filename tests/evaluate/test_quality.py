"""Quality figures of quantized folders: measured against the float parent, kept in the manifest and the card."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

import retnet_tools as rt
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.quantize import steps
from tests.exports import export
from tests.helpers import ABLATIONS, random_source
from tests.tolerances import FLOAT16_KL

FIXTURE = Path(__file__).parents[2] / "fixtures" / "shakespeare"
HELD_OUT = FIXTURE / "heldout.txt"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rt.export(FIXTURE, tmp_path_factory.mktemp("quality") / "float").folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "float"))


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
        700,
        "--json",
    )
    assert result.exit_code == 0
    quality = json.loads(result.out)["quality"]
    measured = json.loads(
        cli("perplexity", tmp_path / "q", "--text", HELD_OUT, "-n", 700, "--against", folder, "--json").out
    )
    assert quality["tokens"] == measured["text"]["scored_tokens"]
    assert quality["perplexity"] == pytest.approx(measured["model"]["mean_ppl"]["value"], rel=1e-6)
    assert quality["float_perplexity"] == pytest.approx(measured["baseline"]["mean_ppl"]["value"], rel=1e-6)
    assert quality["mean_kl"] == pytest.approx(measured["divergence"]["mean_kld"]["value"], rel=1e-3)
    assert quality["same_top"] == pytest.approx(measured["divergence"]["same_top_p"]["value"], rel=1e-6)
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
        "export", FIXTURE, "-o", tmp_path / "q", "--quantize", "int8", "--text", HELD_OUT, "--text-tokens", 700
    )
    assert result.exit_code == 0
    assert "quality       PPL" in result.out
    record = read_manifest(tmp_path / "q").quantization
    assert record is not None
    assert record.quality is not None
    assert 0 < record.quality.mean_kl < 1e-3


def test_half_precision_is_measured_too(folder: Path, tmp_path: Path, cli) -> None:
    arguments = ["--quantize", "fp16", "--text", HELD_OUT, "--text-tokens", 700]
    result = cli("quantize", folder, "-o", tmp_path / "q", *arguments)
    assert result.exit_code == 0
    assert "of float32: float16 weights and activations, rtn" in result.out
    quality = read_manifest(tmp_path / "q").quantization.quality
    assert 0 < quality.mean_kl < FLOAT16_KL
    assert f"{quality.perplexity:.4f}" in (tmp_path / "q" / "README.md").read_text(encoding="utf-8")


def test_the_hash_is_of_the_bytes_whatever_ends_a_line(folder: Path, tmp_path: Path, cli) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(HELD_OUT.read_bytes()[:3000].replace(b"\n", b"\r\n"))
    arguments = ["--quantize", "int8", "--text", text, "--json"]
    quality = json.loads(cli("quantize", folder, "-o", tmp_path / "q", *arguments).out)["quality"]
    assert quality["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    report = json.loads(cli("perplexity", folder, "--text", text, "--json").out)
    assert quality["float_perplexity"] == pytest.approx(report["model"]["mean_ppl"]["value"], rel=1e-6)


def without_tokenizer(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    manifest = json.loads((folder / "retnet.json").read_text())
    manifest["tokenizer_files"].remove("tokenizer.json")
    (folder / "retnet.json").write_text(json.dumps(manifest))


def short_text(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("To be, or not to be")


@pytest.mark.parametrize(
    ("arguments", "prepare", "code", "message"),
    [
        (["bf16", "--text", HELD_OUT], None, 2, "--text with bfloat16, for which ONNX Runtime has no CPU kernels"),
        (["int8", "--text", "missing.txt"], None, 5, "no file missing.txt"),
        (["int8", "--text-tokens", 9], None, 2, "--text-tokens without a text"),
        (["int8", "--text", HELD_OUT, "--text-tokens", 100], None, 2, "a text of 100 tokens; expected at least 258"),
        (["int8", "--text", "{tmp}/short.txt"], short_text, 2, "expected at least 258"),
        (["int8", "--text", HELD_OUT], without_tokenizer, 2, "but no tokenizer.json with the model"),
        (
            ["int4", "--method", "gptq", "--calibration", HELD_OUT, "--text", HELD_OUT],
            None,
            2,
            "heldout.txt is the text to calibrate on and the one to measure on; expected two texts",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_done(
    arguments: list, prepare, code: int, message: str, folder: Path, tmp_path: Path, cli, monkeypatch
) -> None:
    if prepare is not None:
        prepare(folder, tmp_path)
    monkeypatch.setattr(steps, "plan_blocks", lambda *a, **k: pytest.fail("planned"))
    words = [str(word).replace("{tmp}", str(tmp_path)) for word in arguments]
    result = cli("quantize", folder, "-o", tmp_path / "q", "--quantize", *words)
    assert (result.exit_code, result.out) == (code, "")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["float"]


def test_float_weights_and_a_stack_are_not_measured(tmp_path: Path, cli) -> None:
    result = cli("export", FIXTURE, "-o", tmp_path / "q", "--text", HELD_OUT)
    assert result.exit_code == 2
    assert "--text with float32; expected --quantize with a type" in result.err
    stack = export(ABLATIONS["stack"], random_source(ABLATIONS["stack"], 1), tmp_path / "stack")
    result = cli("quantize", stack, "-o", tmp_path / "q", "--quantize", "int8", "--text", HELD_OUT)
    assert result.exit_code == 2
    assert "--text for a stack without embedding" in result.err
    assert not (tmp_path / "q").exists()


def test_a_folder_for_genai_is_not_measured(tmp_path: Path, cli) -> None:
    result = cli("export", FIXTURE, "--to", "genai", "-o", tmp_path / "q", "--quantize", "int8", "--text", HELD_OUT)
    assert result.exit_code == 2
    assert "--text for model.onnx; expected an export of --to onnx" in result.err
    assert not (tmp_path / "q").exists()
