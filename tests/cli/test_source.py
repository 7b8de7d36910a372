"""The options that say how a checkpoint is to be read reach the reader from every command that takes one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from retnet_tools.evaluate.logits import is_export
from retnet_tools.formats import open_checkpoint
from tests.bench.inline import measure_inline
from tests.formats.cases import SETTINGS, small_tensors

UNTOLD = {name: value for name, value in SETTINGS.items() if name != "torchscale_version"}
COMMANDS = {
    "inspect": ("inspect", "{model}", "--quick", "--json"),
    "verify": ("verify", "{model}", "--tokens", 4, "--json"),
    "convert": ("convert", "{model}", "{out}", "--json"),
    "export": ("export", "{model}", "-o", "{out}", "--json"),
    "perplexity": ("perplexity", "{model}", "--text", "{text}", "--token-ids", "-c", 4, "--json"),
    "bench": ("bench", "{model}", "-p", 4, "-n", 1, "-r", 1, "-t", 1, "--quick", "--json"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two state dicts in one file, its configuration elsewhere, with a key that nobody knows and without the clamp."""
    first = {name: torch.from_numpy(tensor) for name, tensor in small_tensors().items()}
    second = {name: tensor * 0.5 if "proj" in name else tensor for name, tensor in first.items()}
    (tmp_path / "model").mkdir()
    torch.save({"first": first, "second": second}, tmp_path / "model" / "last.ckpt")
    (tmp_path / "elsewhere.json").write_text(json.dumps({**UNTOLD, "house_style": "warm"}))
    (tmp_path / "text").write_text("1 2 3 4 5 6 1 2")
    return tmp_path


def arguments(command: str, folder: Path, options: dict[str, object]) -> list[object]:
    places = {"model": folder / "model", "out": folder / "out", "text": folder / "text"}
    words = [word.format(**places) if isinstance(word, str) else word for word in COMMANDS[command]]
    return words + [word for option, value in options.items() for word in (option, value)]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_is_asked_for_and_all_of_them_are_enough(
    command: str, folder: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_inline(monkeypatch)
    options = {"--config": folder / "elsewhere.json", "--entry": "second", "--ignore-key": "house_style"}
    for left_out, said in (
        ("--config", "--config"),
        ("--entry", "--entry"),
        ("--ignore-key", "--ignore-key house_style"),
    ):
        others = {option: value for option, value in options.items() if option != left_out}
        result = cli(*arguments(command, folder, others))
        assert result.exit_code == 5
        assert "--json" not in arguments(command, folder, {}) or json.loads(result.out)["error"]["exit_code"] == 5
        assert said in result.err
    assert cli(*arguments(command, folder, options | {"--from": "fla"})).exit_code == 5
    result = cli(*arguments(command, folder, options | {"--clamp": "abs-of-sum", "--from": "torchscale"}))
    assert result.exit_code == 0, result.err
    document = json.loads(result.out)
    if command != "bench":
        asked = {"entry": "second", "ignore_keys": ["house_style"], "clamp": "abs_of_sum", "format": "torchscale"}
        assert asked.items() <= document["request"].items()


@pytest.mark.parametrize("clamp", ["abs-of-sum", "sum-of-abs"])
def test_what_is_converted_is_what_the_options_name(clamp: str, folder: Path, cli) -> None:
    options = {"--config": folder / "elsewhere.json", "--entry": "second", "--ignore-key": "house_style"}
    assert cli(*arguments("convert", folder, options | {"--clamp": clamp})).exit_code == 0
    converted = open_checkpoint(folder / "out")
    assert converted.config.score_normalization.clamp == clamp.replace("-", "_")
    assert not converted.assumed_clamp
    expected = small_tensors()["output_projection.weight"] * np.float32(0.5)
    np.testing.assert_array_equal(converted.weights.read("lm_head.weight"), expected)


def test_an_export_is_scored_as_an_export_unless_an_option_says_how_to_read_a_checkpoint(folder: Path, cli) -> None:
    options = {"--config": folder / "elsewhere.json", "--entry": "second", "--ignore-key": "house_style"}
    assert cli(*arguments("export", folder, options)).exit_code == 0
    assert is_export(folder / "out")
    words = ("perplexity", folder / "out", "--text", folder / "text", "--token-ids", "-c", 4, "--json")
    assert cli(*words).exit_code == 0
    for option, value in options.items():
        result = cli(*words, option, value)
        assert (result.exit_code, list(json.loads(result.out))) == (5, ["schema_version", "error"])
        assert "ONNX export" in result.err


def test_no_clamp_is_no_name_of_one(folder: Path, cli) -> None:
    result = cli(*arguments("verify", folder, {"--clamp": "none"}))
    assert result.exit_code == 2
    assert "one of abs-of-sum, sum-of-abs" in result.err
