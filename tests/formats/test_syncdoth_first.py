"""What the buffers of syncdoth/RetNet's first layout may hold, and what is said about them; its logits are judged in
`test_layouts`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from retnet_tools.formats import open_checkpoint
from retnet_tools.weights import Array
from tests.formats.cases import CONFORMANCE, refusal

SOURCE, TIED = CONFORMANCE / "syncdoth_2023_wac81/hf_safetensors", CONFORMANCE / "syncdoth_first_tied"
DECAY, SCALE = "model.blocks.{}.msr.decay", "model.blocks.{}.msr.xpos.scale"
PAPER = (1 - 2.0 ** -np.array([5.0, 6.0, 7.0])).astype(np.float32)
OWN = np.array([0.9, 0.5, 0.75], dtype=np.float32)


def changed(folder: Path, source: Path, change: dict[str, Array], **settings: Any) -> Path:
    folder.mkdir()
    document = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, **settings}))
    save_file({**load_file(source / "model.safetensors"), **change}, folder / "model.safetensors")
    return folder


def of_layers(name: str, array: Array) -> dict[str, Array]:
    return {name.format(i): array for i in range(2)}


def test_gammas_of_another_schedule_are_used_and_noted(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(changed(tmp_path / "x", SOURCE, of_layers(DECAY, OWN)))
    np.testing.assert_allclose(np.exp(checkpoint.config.decay), OWN, rtol=1e-7)
    (note,) = checkpoint.notes
    assert "used as stored" in note


def test_rounded_buffers_are_noted_and_computed_again(tmp_path: Path) -> None:
    state = load_file(SOURCE / "model.safetensors")
    half = {name: value.astype(np.float16) for name, value in state.items() if name.endswith(("decay", "scale"))}
    found, expected = open_checkpoint(changed(tmp_path / "x", SOURCE, half)), open_checkpoint(SOURCE)
    np.testing.assert_allclose(found.config.decay, expected.config.decay, rtol=1e-6)
    np.testing.assert_allclose(found.config.key_decay, expected.config.key_decay, rtol=1e-6)
    assert ["decay is rounded" in note or "scale is rounded" in note for note in found.notes] == [True, True]
    assert expected.notes == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({DECAY.format(1): OWN}, r"blocks\.1\.msr\.decay' differs .*one for all"),
        ({SCALE.format(1): np.full(24, 0.5)}, r"blocks\.1\.msr\.xpos\.scale' differs .*one for all"),
        (of_layers(DECAY, PAPER), "use_default_gamma = False; expected True"),
        (of_layers(DECAY, np.array([0.9, 1.5, 0.5], np.float32)), r"decay' holds .*numbers in \(0, 1\]"),
        (of_layers(DECAY, np.array([0.9, 0.0, 0.5], np.float32)), r"decay' holds .*numbers in \(0, 1\]"),
        (of_layers(DECAY, OWN[:2].copy()), r"decay' has shape \[2\]; expected \[3\]"),
        (of_layers(SCALE, np.full(24, 0.5, np.float32) * (np.arange(24) > 0)), r"scales outside \(0, 1\]"),
        (of_layers(SCALE, np.full(24, 0.75, np.float32) * (1 + np.arange(24))), r"scales outside \(0, 1\]"),
        (of_layers(SCALE, np.full(8, 0.5, np.float32)), r"scale' has shape \[8\]; expected \[24\]"),
    ],
    ids=[
        "layers",
        "scales of layers",
        "flag",
        "above 1",
        "zero",
        "heads",
        "scale zero",
        "scale above 1",
        "scale of a head",
    ],
)
def test_buffers_of_no_such_model_are_refused(change: dict[str, Array], match: str, tmp_path: Path) -> None:
    change = {name: value.astype(np.float32) for name, value in change.items()}
    refusal(changed(tmp_path / "x", SOURCE, change), match)


def test_a_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    embedding = load_file(TIED / "model.safetensors")["model.embedding.weight"]
    same = changed(tmp_path / "same", TIED, {"lm_head.weight": embedding.copy()}, tie_word_embeddings=True)
    assert open_checkpoint(same).config.tie_word_embeddings
    other = {"lm_head.weight": embedding[::-1].copy()}
    refusal(changed(tmp_path / "other", TIED, other, tie_word_embeddings=True), r"'lm_head\.weight' differs")
    # Where it is not stated, as its class leaves it, the tensors tell.
    assert not open_checkpoint(changed(tmp_path / "untold", TIED, other)).config.tie_word_embeddings
