"""Small inputs that once failed, built by the scripts of `tests/data/cases`, each an example of its kind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from retnet_tools.errors import InputError
from retnet_tools.formats import Checkpoint, open_checkpoint
from retnet_tools.model.retention import FORMS
from retnet_tools.model.retnet import load_model

CASES = Path(__file__).parent.parent / "data" / "cases"
REFERENCE_TOLERANCE = 1e-6
"""Their float64 reference makes its own frequencies, which differ from the stored ones in the last float32 bit."""


def made(number: str, folder: Path) -> Path:
    subprocess.run(
        [sys.executable, CASES / f"make_{number}.py", folder], check=True, stdout=subprocess.DEVNULL, timeout=600
    )
    return folder


def assert_same_model(checkpoint: Checkpoint, expected: Checkpoint) -> None:
    assert checkpoint.config == expected.config
    assert list(checkpoint.weights.names()) == list(expected.weights.names())
    for name in expected.weights.names():
        np.testing.assert_array_equal(checkpoint.weights.read(name), expected.weights.read(name), err_msg=name)


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("01", tmp_path_factory.mktemp("wrapped"))


@pytest.mark.parametrize("name", ["ts", "tsold", "sd", "fla", "yar", "js"])
def test_wrappers_prefixes_come_off_in_every_format(name: str, wrapped: Path) -> None:
    plain = open_checkpoint(wrapped / f"{name}-plain")
    folders = sorted(wrapped.glob(f"{name}-*"))
    assert len(folders) == 8
    for folder in folders:
        assert_same_model(open_checkpoint(folder), plain)


def test_trainers_files_hold_the_same_weights_under_whatever_key_and_name(tmp_path: Path) -> None:
    plain = open_checkpoint(made("02", tmp_path) / "plain")
    folders = [folder for folder in sorted(tmp_path.iterdir()) if folder.name != "plain"]
    assert len(folders) > 20
    for folder in folders:
        checkpoint = open_checkpoint(folder)
        assert_same_model(checkpoint, plain)
        assert any("average" in note for note in checkpoint.notes) == ("ema" in folder.name)
    average = open_checkpoint(tmp_path / "key-ema", entry="model_ema")
    name = "layers.1.ffn.up_proj.weight"
    np.testing.assert_array_equal(average.weights.read(name), plain.weights.read(name) * np.float32(0.5))


@pytest.mark.parametrize("number", ["04", "05", "07"])
def test_logits_are_those_of_the_reference(number: str, tmp_path: Path) -> None:
    found = sorted(made(number, tmp_path).glob("*.npz"))
    assert found
    for file in found:
        with np.load(file) as arrays:
            ids, expected = torch.from_numpy(arrays["ids"]), arrays["logits"]
        folders = [folder for folder in tmp_path.iterdir() if folder.is_dir() and folder.name.startswith(file.stem)]
        assert folders
        for folder in folders:
            checkpoint = open_checkpoint(folder)
            with torch.no_grad():
                model = load_model(checkpoint.config, checkpoint.weights, torch.float64)
                logits = model(ids, form=FORMS["recurrent"]).logits.numpy()
            assert np.abs(logits - expected).max() <= REFERENCE_TOLERANCE, folder.name


def test_the_first_layout_of_syncdoth_is_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(made("06", tmp_path) / "model")
    assert checkpoint.format == "syncdoth/RetNet (until October 2023)"
    assert checkpoint.config.has_head_rotation
    assert checkpoint.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("bnb4", "bitsandbytes"),
        ("bnb8", "bitsandbytes"),
        ("gptq", "gptq"),
        ("fp8", "fp8"),
        ("fp8-scaled", "fp8"),
        ("fp8-pt", "fp8"),
        ("lora", "adapter"),
        ("meta", "meta device, without data"),
    ],
)
def test_what_holds_no_float_weights_is_refused_by_what_it_is(name: str, what: str, foreign: Path) -> None:
    with pytest.raises(InputError, match=what) as caught:
        open_checkpoint(foreign / name)
    assert len(str(caught.value)) <= 200
    assert "\n" not in str(caught.value)
    assert caught.value.action


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("13", tmp_path_factory.mktemp("foreign"))


def test_tensors_are_read_however_they_lie_in_memory(tmp_path: Path) -> None:
    made("14", tmp_path)
    for folder in sorted(tmp_path.iterdir()):
        checkpoint = open_checkpoint(folder)
        tree = torch.load(folder / "model.pt", weights_only=True)
        for stored, name in (
            ("layer_norm.weight", "final_norm.weight"),
            ("layers.1.ffn.fc2.weight", "layers.1.ffn.down_proj.weight"),
            ("layers.0.retention.q_proj.weight", "layers.0.retention.q_proj.weight"),
        ):
            expected = tree[stored].detach()
            read = checkpoint.weights.read(name)
            assert str(expected.dtype).removeprefix("torch.") == read.dtype.name
            np.testing.assert_array_equal(read.astype(np.float64), expected.double().numpy(), err_msg=folder.name)
