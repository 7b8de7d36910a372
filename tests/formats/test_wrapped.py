"""torchscale inside other models: its tensors under other names, with other keys, are the same model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from retnet_tools.formats import Checkpoint, open_checkpoint
from retnet_tools.weights import Array
from tests.formats.cases import CONFORMANCE, refusal, small_tensors, write_torchscale

HEAD, EMBEDDING = "output_projection.weight", "embed_tokens.weight"
STATED = {"vocab_size": 7, "decoder_normalize_before": True, "no_scale_embedding": False}
# Every name of a key differs from torchscale's, and every size from the others.
NAMES = {
    "hidden_act": "activation_fn",
    "hidden_size": "decoder_embed_dim",
    "intermediate_size": "decoder_ffn_embed_dim",
    "num_hidden_layers": "decoder_layers",
    "num_retention_heads": "decoder_retention_heads",
    "rms_norm_eps": "layernorm_eps",
    "value_dim": "decoder_value_embed_dim",
}
VALUES = {
    "hidden_act": "swish",
    "hidden_size": 8,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_retention_heads": 2,
    "rms_norm_eps": 3e-4,
    "value_dim": 12,
}
OWN = {NAMES[name]: value for name, value in VALUES.items()} | STATED
TIED_KEYS = ("tie_word_embeddings", "share_decoder_input_output_embed")


def hugging_face(folder: Path, change: dict[str, Array | None] | None = None, **settings: Any) -> Path:
    """A model in the wrapper; its tensors under torchscale's names but for those of `change`, None leaving one out."""
    state = {f"model.decoder.{name}": tensor for name, tensor in small_tensors().items()} | (change or {})
    folder.mkdir()
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "retnet", **VALUES, **STATED, **settings}))
    return folder


def assert_same(wrapped: Checkpoint, own: Checkpoint) -> None:
    assert wrapped.config == own.config
    for name in own.weights.names():
        np.testing.assert_array_equal(wrapped.weights.read(name), own.weights.read(name), err_msg=name)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_keys_of_transformers_mean_torchscale_s(tied: bool, tmp_path: Path) -> None:
    tensors = small_tensors()
    if tied:
        tensors[HEAD] = tensors[EMBEDDING].copy()
    own = open_checkpoint(write_torchscale(tmp_path / "own", tensors, OWN | {TIED_KEYS[1]: tied}))
    head = {f"model.decoder.{HEAD}": tensors[HEAD]}
    assert_same(open_checkpoint(hugging_face(tmp_path / "stated", head, tie_word_embeddings=tied)), own)
    # What is not stated is told by the tensors, as transformers would have it.
    assert_same(open_checkpoint(hugging_face(tmp_path / "untold", head)), own)
    names = {"lm_head.weight": tensors[HEAD], f"model.decoder.{HEAD}": None}
    names |= {"model.embed_tokens.weight": tensors[EMBEDDING], f"model.decoder.{EMBEDDING}": None}
    assert_same(open_checkpoint(hugging_face(tmp_path / "names", names)), own)
    both = head | {"lm_head.weight": tensors[HEAD].copy(), "model.embed_tokens.weight": tensors[EMBEDDING].copy()}
    assert_same(open_checkpoint(hugging_face(tmp_path / "both", both)), own)


@pytest.mark.parametrize("head", [f"model.decoder.{HEAD}", "lm_head.weight"])
def test_of_two_layouts_that_fit_the_one_is_read_that_knows_every_tensor_and_prefix(head: str, tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "x", {head: small_tensors()[HEAD]})
    (folder / "args.json").write_text(json.dumps(OWN))
    assert open_checkpoint(folder).format == "torchscale (in Hugging Face's transformers)"
    assert open_checkpoint(folder, "torchscale-hf").config == open_checkpoint(folder).config


def test_a_head_that_is_nowhere_is_the_embedding(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "x", {f"model.decoder.{HEAD}": None})
    assert open_checkpoint(folder).config.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "settings", "match"),
    [
        ({}, {"tie_word_embeddings": True}, HEAD),
        ({"lm_head.weight": np.ones((7, 8), np.float32)}, {"tie_word_embeddings": False}, HEAD),
        ({"model.embed_tokens.weight": np.ones((7, 8), np.float32)}, {}, EMBEDDING),
    ],
    ids=["stated tie", "two heads", "two embeddings"],
)
def test_names_of_one_tensor_that_differ_are_refused(
    change: dict[str, Array | None], settings: dict[str, Any], match: str, tmp_path: Path
) -> None:
    refusal(hugging_face(tmp_path / "x", change, **settings), rf"'model\.decoder\.{match}' differs")


def test_the_wrapper_does_not_tell_its_clamp(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(hugging_face(tmp_path / "x"))
    assert checkpoint.assumed_clamp
    assert [note for note in checkpoint.notes if "--clamp" in note] == checkpoint.notes
    named = open_checkpoint(tmp_path / "x", clamp="abs_of_sum")
    assert (named.config.score_normalization.clamp, named.notes) == ("abs_of_sum", [])


def test_rounded_buffers_are_noted(tmp_path: Path) -> None:
    name = "model.decoder.retnet_rel_pos.angle"
    half = small_tensors()["retnet_rel_pos.angle"].astype(np.float16)
    assert any(
        "rounded in the file" in note for note in open_checkpoint(hugging_face(tmp_path / "x", {name: half})).notes
    )


STUDENT = CONFORMANCE / "distillation_student/run"


def student(folder: Path, change: dict[str, torch.Tensor | None] | None = None, **settings: Any) -> Path:
    opened = open_checkpoint(STUDENT)
    (file,) = STUDENT.iterdir()
    state = torch.load(file, weights_only=False)["model_state_dict"] | (change or {})
    folder.mkdir()
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, folder / "model.pt")
    (folder / "config.json").write_text(json.dumps({**opened.settings, **settings}))
    return folder


@pytest.mark.parametrize(
    "change",
    [{"mlp_mult": 2}, {"normalize_before": False}, {"activation_fn": "swish"}, {"layernorm_eps": 1e-6}],
    ids=lambda change: next(iter(change)),
)
def test_what_the_backbone_of_the_student_ignores_must_be_what_it_has(change: dict[str, Any], tmp_path: Path) -> None:
    assert_same(open_checkpoint(student(tmp_path / "same")), open_checkpoint(STUDENT))
    refusal(student(tmp_path / "x", **change), f"has {next(iter(change))} = .*its backbone always has")


def test_the_student_is_tied_unless_it_says_otherwise(tmp_path: Path) -> None:
    assert open_checkpoint(student(tmp_path / "untold", tie_word_embeddings=None)).config.tie_word_embeddings
    ones = torch.ones(31, 18)
    refusal(student(tmp_path / "x", {"lm_head.proj.weight": ones}), r"'lm_head\.proj\.weight' differs")
    untied = open_checkpoint(student(tmp_path / "y", {"lm_head.proj.weight": ones}, tie_word_embeddings=False))
    np.testing.assert_array_equal(untied.weights.read("lm_head.weight"), ones.numpy())
    assert dataclasses.replace(untied.config, tie_word_embeddings=True) == open_checkpoint(STUDENT).config


def test_rounded_buffers_of_the_student_are_noted(tmp_path: Path) -> None:
    (file,) = STUDENT.iterdir()
    decay = torch.load(file, weights_only=False)["model_state_dict"]["decoder.retnet_rel_pos.decay"]
    half = {"decoder.retnet_rel_pos.decay": decay.bfloat16()}
    config, notes = (checkpoint := open_checkpoint(student(tmp_path / "x", half))).config, checkpoint.notes
    assert any("rounded in the file" in note for note in notes)
    np.testing.assert_allclose(config.decay, open_checkpoint(STUDENT).config.decay, rtol=1e-6)
