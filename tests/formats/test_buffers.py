"""Schedules in a file: read where they are exact, computed where they are rounded or missing, refused where neither
tells the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from retnet_tools.errors import InputError
from retnet_tools.formats import Checkpoint, open_checkpoint
from retnet_tools.weights import Array
from tests.formats.cases import CONFORMANCE, small_tensors, write_torchscale

FOLDERS = {
    "syncdoth": ("sd_base_gelu/hf_safetensors", "retnet_rel_pos"),
    "xatl": ("xatl_410m/hf_safetensors", "retnet_rel_pos"),
    "syncdoth-first": ("syncdoth_first_tied", ".msr.decay"),
    "syncdoth-first, xpos": ("syncdoth_first_tied", ".xpos.scale"),
}
HALF = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def changed(name: str, folder: Path, change: Callable[[Array], Array]) -> Path:
    """A copy of an example whose buffers are changed."""
    source, buffer = FOLDERS[name]
    tensors = load_file(CONFORMANCE / source / "model.safetensors")
    found = {key: change(value) for key, value in tensors.items() if buffer in key}
    assert found
    folder.mkdir()
    save_file({**tensors, **found}, folder / "model.safetensors")
    (folder / "config.json").write_text((CONFORMANCE / source / "config.json").read_text())
    return folder


def schedules(checkpoint: Checkpoint) -> tuple[object, ...]:
    config = checkpoint.config
    return config.decay, config.rotary_frequencies, config.key_decay


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", FOLDERS)
def test_what_a_half_type_rounds_is_computed_again_and_another_schedule_in_one_is_refused(
    name: str, dtype: str, tmp_path: Path
) -> None:
    exact = open_checkpoint(CONFORMANCE / FOLDERS[name][0])
    rounded = open_checkpoint(changed(name, tmp_path / "rounded", lambda values: values.astype(HALF[dtype])))
    assert schedules(rounded) == schedules(exact)
    assert any("rounded in the file" in note for note in rounded.notes)
    with pytest.raises(
        InputError, match=f"holds another schedule than the published one, rounded to {dtype}"
    ) as caught:
        open_checkpoint(changed(name, tmp_path / "other", lambda values: (0.8 * values).astype(HALF[dtype])))
    assert len(str(caught.value)) <= 200


@pytest.mark.parametrize("name", FOLDERS)
def test_another_schedule_in_float32_is_used_and_said(name: str, tmp_path: Path) -> None:
    other = open_checkpoint(changed(name, tmp_path / "other", lambda values: 0.8 * values))
    assert schedules(other) != schedules(open_checkpoint(CONFORMANCE / FOLDERS[name][0]))
    assert any("differs from the published schedules: used as stored" in note for note in other.notes)


@pytest.mark.parametrize("kept", ["angle", "decay"])
def test_one_buffer_without_the_other_is_read(kept: str, tmp_path: Path) -> None:
    tensors = small_tensors()
    other = tensors.pop(f"retnet_rel_pos.{'decay' if kept == 'angle' else 'angle'}")
    assert other.size
    tensors[f"retnet_rel_pos.{kept}"] *= np.float32(0.5)
    checkpoint = open_checkpoint(write_torchscale(tmp_path, tensors))
    expected = tensors[f"retnet_rel_pos.{kept}"]
    found = checkpoint.config.decay if kept == "decay" else np.repeat(checkpoint.config.rotary_frequencies, 2)
    np.testing.assert_array_equal(found, expected)
    assert any(f"retnet_rel_pos.{kept} in the file differs" in note for note in checkpoint.notes)


def test_the_schedule_that_the_configuration_does_not_name_is_refused_in_half_types_too(tmp_path: Path) -> None:
    source = CONFORMANCE / "sd_lmdecay_tied/hf_safetensors"
    tensors = load_file(source / "model.safetensors")
    name = "model.retnet_rel_pos.decay"
    save_file({**tensors, name: tensors[name].astype(np.float16)}, tmp_path / "model.safetensors")
    document = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**document, "use_lm_decay": False}))
    with pytest.raises(InputError, match="use_lm_decay"):
        open_checkpoint(tmp_path)


def test_a_buffer_of_integers_is_refused(tmp_path: Path) -> None:
    tensors = {**small_tensors(), "retnet_rel_pos.decay": np.zeros(2, np.int32)}
    with pytest.raises(InputError, match=r"retnet_rel_pos\.decay' is int32; expected float32"):
        open_checkpoint(write_torchscale(tmp_path, tensors, name="model.safetensors"))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("yar_base", "decoder.layers.1.retention.thetas"),
        ("js_base", "retentions.1.retentions.0.xpos.scale"),
        ("js_base", "retentions.0.retentions.1.xpos.scale"),
        ("syncdoth_first_tied", "model.blocks.1.msr.xpos.scale"),
        ("syncdoth_first_tied", "model.blocks.1.msr.decay"),
    ],
)
def test_a_buffer_that_differs_between_layers_or_heads_is_refused(source: str, name: str, tmp_path: Path) -> None:
    weights = open_checkpoint(CONFORMANCE / source).source_files[-1]
    document = next(file for file in weights.parent.glob("*.json") if file.name in ("args.json", "config.json"))
    (tmp_path / document.name).write_text(document.read_text())
    if weights.suffix == ".safetensors":
        tensors = load_file(weights)
    else:
        tensors = {key: value.numpy() for key, value in torch.load(weights, weights_only=True).items()}
    save_file({**tensors, name: tensors[name] * np.float32(0.5)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=f"tensor '{name}' differs from"):
        open_checkpoint(tmp_path)
