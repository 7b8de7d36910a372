"""`quantize` and `export --quantize` that learn from a text: the folder, going on after a stop, one line an error."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import retnet_tools as rt
from retnet_tools.formats.canonical import write_canonical
from retnet_tools.graph.contract import WEIGHTS_FILE
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.paper import paper_config
from retnet_tools.quantize.sensitivity import Sensitivity
from tests.helpers import random_source
from tests.quantize.calibrated import FIXTURE

TEXT = FIXTURE / "calibration.txt"
# The tokenizer is the fixture's, and so is the vocabulary.
CONFIG = paper_config(vocab_size=2048, hidden_size=64, value_dim=64, ffn_dim=64, num_layers=2, num_heads=2)
LEARN = ["--calibration", TEXT, "--calibration-tokens", 1024]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    write_canonical(folder, CONFIG, random_source(CONFIG, 1), extra_files=[FIXTURE / "tokenizer.json"])
    return folder


@pytest.fixture
def folder(model: Path, tmp_path: Path, cli) -> Path:
    assert cli("export", model, "-o", tmp_path / "model").exit_code == 0
    return tmp_path / "model"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_gptq_writes_the_folder_and_says_what_it_learnt_from(folder: Path, cli) -> None:
    result = cli("quantize", folder, "--quantize", "int4", "--method", "gptq", *LEARN)
    assert result.exit_code == 0
    assert result.err == ""
    assert "int4 in blocks of 64, symmetric, gptq" in result.out
    assert names(folder.parent) == ["model", "model-int4"]
    record = read_manifest(folder.parent / "model-int4").quantization
    assert (record.calibration.text, record.calibration.tokens) == ("calibration.txt", 1024)
    card = (folder.parent / "model-int4" / "README.md").read_text(encoding="utf-8")
    assert f"Calibrated on 1024 tokens of `calibration.txt` (sha256 {record.calibration.sha256})" in card
    assert f"in sequences of 512, drawn with seed 0, token ids {record.calibration.ids_sha256[:12]}." in card


def test_codes_differ_from_round_to_nearest_and_by_the_seed_alone(folder: Path, tmp_path: Path, cli) -> None:
    runs = {"rtn": [], "a": ["--method", "gptq", *LEARN], "again": ["--method", "gptq", *LEARN, "--seed", 0]}
    runs["b"] = ["--method", "gptq", *LEARN, "--seed", 1]
    data = {}
    for name, arguments in runs.items():
        assert cli("quantize", folder, "--quantize", "int4", "-o", tmp_path / name, *arguments).exit_code == 0
        data[name] = (tmp_path / name / WEIGHTS_FILE).read_bytes()
    assert len({len(content) for content in data.values()}) == 1
    assert data["a"] == data["again"]
    assert len({data["rtn"], data["a"], data["b"]}) == 3


def test_calibrating_at_export_writes_the_same_weights(model: Path, folder: Path, tmp_path: Path, cli) -> None:
    arguments = ["--quantize", "int4", "--method", "gptq", *LEARN]
    assert cli("quantize", folder, "-o", tmp_path / "two", *arguments).exit_code == 0
    assert cli("export", model, "-o", tmp_path / "one", *arguments).exit_code == 0
    for name in names(tmp_path / "two"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_target_chooses_types_and_keeps_to_it(method: str, folder: Path, tmp_path: Path, cli) -> None:
    arguments = ["--quantize", "int4", "--method", method, "--target-bits", 6, "--keep-merged", *LEARN]
    result = cli("quantize", folder, "-o", tmp_path / "out", *arguments, "--json")
    document = json.loads(result.out)
    quantization = document["quantization"]
    assert quantization["scheme"]["tensor_types"]
    assert (quantization["calibration"] is None) == (method == "rtn")
    assert quantization["mixed_precision"]["target_bits"] == 6
    assert quantization["mixed_precision"]["text"]["tokens"] == 1024
    assert re.fullmatch(
        r"types chosen by sensitivity: mean KL divergence \S+ predicted, \S+ measured \(rounded to nearest, 1024 "
        r"tokens of calibration.txt\)",
        document["notes"][-1],
    )
    assert names(tmp_path) == ["model", "out"]


def test_a_target_size_is_that_of_the_file(folder: Path, tmp_path: Path, cli) -> None:
    size = int(0.7 * (folder / WEIGHTS_FILE).stat().st_size)
    arguments = ["--quantize", "int4", "--target-size", f"{size / 1e6:.3f}MB", *LEARN]
    result = cli("quantize", folder, "-o", tmp_path / "out", *arguments, "--json")
    written = (tmp_path / "out" / WEIGHTS_FILE).stat().st_size
    assert 0.9 * size < written <= size
    assert json.loads(result.out)["weight_bytes"] == json.loads(result.out)["quantization"]["weight_bytes"] == written


def test_what_a_dry_run_measures_is_kept_for_the_run_that_writes(
    folder: Path, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["quantize", folder, "-o", tmp_path / "out", "--quantize", "int4", "--target-bits", 6, *LEARN]
    dry = cli(*arguments, "--dry-run", "--json")
    kept = tmp_path / ".out.unfinished"
    assert dry.err == f"what was done is kept in {kept}; the same command without --dry-run goes on from there\n"
    assert names(tmp_path) == [kept.name, "model"]
    measured: list[int] = []
    original = Sensitivity._divergence
    monkeypatch.setattr(Sensitivity, "_divergence", lambda *a: measured.append(1) or original(*a))
    result = cli(*arguments, "--json")
    # All together is the only thing that is left to measure.
    assert len(measured) == 1
    assert json.loads(dry.out)["quantization"] == json.loads(result.out)["quantization"]
    assert names(tmp_path) == ["model", "out"]


def test_a_run_leaves_alone_what_another_one_keeps(folder: Path, tmp_path: Path, cli) -> None:
    kept = tmp_path / ".out.unfinished" / "gptq-0"
    kept.mkdir(parents=True)
    failed = cli("quantize", folder, "-o", tmp_path / "out", "--quantize", "int8", "--exclude", "nothing")
    assert failed.exit_code == 2
    assert "what was done is kept" not in failed.err
    assert cli("quantize", folder, "-o", tmp_path / "out", "--quantize", "int8").exit_code == 0
    assert kept.is_dir()


def test_a_text_of_few_tokens_is_noted(folder: Path, tmp_path: Path, cli) -> None:
    (tmp_path / "short.txt").write_text("To be, or not to be, that is the question.")
    arguments = ["--quantize", "int4", "--method", "gptq", "--calibration", tmp_path / "short.txt"]
    result = cli("quantize", folder, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 0
    assert re.search(r"note: \d\d tokens to calibrate on are fewer than the 64 inputs of the widest matrix", result.out)


def test_weights_that_are_not_finite_leave_nothing_behind(folder: Path, tmp_path: Path, cli) -> None:
    data = np.memmap(folder / WEIGHTS_FILE, np.float32, "r+")
    data[np.flatnonzero(data)[-5]] = np.nan
    result = cli("quantize", folder, "--quantize", "int4", "--method", "gptq", *LEARN)
    assert result.exit_code == 5
    assert "NaN" in result.err
    assert result.err.count("\n") == 1
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantize", "int4", "--method", "gptq"], "--method gptq without a text to calibrate on; expected --calib"),
        (["--quantize", "int4", "--calibration", TEXT], "a text to calibrate on with --method rtn"),
        (["--quantize", "fp16", "--calibration", TEXT], "a text to calibrate on with float16 weights"),
        (["--quantize", "int4", "--target-bits", "5"], "a target for size or bits without a text"),
        (["--quantize", "int4", "--target-bits", "2", *LEARN], "--target-bits 2 cannot be met; expected at least 4.5"),
        (["--quantize", "int4", "--target-size", "1kB", *LEARN], "--target-size 0.00MB cannot be met; expected at le"),
        (["--quantize", "int4", "--target-size", "1TB", *LEARN], "is enough for float weights"),
        (["--quantize", "int4", "--target-size", "x", *LEARN], "size 'x'; expected a number with a unit"),
        (["--quantize", "int4", "--target-size", "1MB", "--target-bits", "5", *LEARN], "together; expected one of th"),
        (["--quantize", "int4", "--seed", "1"], "--calibration-tokens or --seed without a text"),
        (["--quantize", "int4", "--calibration", TEXT, "--calibration-tokens", "100"], "expected at least 512"),
        (["--quantize", "int4", "--keep-merged", *LEARN], "--keep-merged without a target"),
        (["--quantize", "int8", "--target-bits", "5", *LEARN], "--quantize int4, larger blocks or fewer exclusions"),
    ],
)
def test_usage_errors_end_with_exit_code_2(arguments: list, message: str, folder: Path, cli) -> None:
    result = cli("quantize", folder, *arguments)
    assert result.exit_code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert names(folder.parent) == ["model"]


def test_a_text_without_quantize_is_refused_by_export(model: Path, tmp_path: Path, cli) -> None:
    result = cli("export", model, "-o", tmp_path / "out", "--calibration", TEXT)
    assert result.exit_code == 2
    assert "options of a quantization scheme without --quantize" in result.err
    assert names(tmp_path) == []


def test_a_missing_text_ends_with_exit_code_5(folder: Path, cli) -> None:
    result = cli("quantize", folder, "--quantize", "int4", "--method", "gptq", "--calibration", folder / "none.txt")
    assert result.exit_code == 5
    assert "no file" in result.err


STOP = """
import os, signal, sys
from retnet_tools.cli import app
from retnet_tools.quantize import gptq_run
block, number = gptq_run._Run._quantize_block, getattr(signal, sys.argv.pop(1))
def stop(self, n):
    if n == 2:
        os.kill(os.getpid(), number)
    block(self, n)
gptq_run._Run._quantize_block = stop
app.main()
"""


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights that a command that is not stopped writes."""
    out, learn = tmp_path_factory.mktemp("whole"), {"calibration": TEXT, "calibration_tokens": 1024}
    folder = rt.export(model, out / "model").folder
    rt.quantize(folder, "int4", out / "whole", method="gptq", **learn)
    return (out / "whole" / WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_a_stopped_command_goes_on_and_leaves_nothing_when_it_is_done(
    name: str, folder: Path, whole: bytes, tmp_path: Path, cli
) -> None:
    arguments = ["quantize", folder, "-o", tmp_path / "out", "--quantize", "int4", "--method", "gptq", *LEARN]
    command = [sys.executable, "-c", STOP, name, *map(str, arguments)]
    stopped = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    number = getattr(signal, name)
    assert stopped.returncode == (-number if name == "SIGKILL" else 128 + number)
    locks = ["..out.unfinished.lock"] if name == "SIGKILL" else []
    assert names(tmp_path) == [*locks, ".out.unfinished", "model"]
    if name != "SIGKILL":
        assert f"what was done is kept in {tmp_path / '.out.unfinished'}; the same command goes on" in stopped.stderr
    assert (
        len(list(tmp_path.glob(".out.unfinished/*/*.npz"))) == 9
    )  # the embedding, and the matrices of the first layer
    assert cli(*arguments).exit_code == 0
    assert names(tmp_path) == ["model", "out"]
    assert (tmp_path / "out" / WEIGHTS_FILE).read_bytes() == whole
