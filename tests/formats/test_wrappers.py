"""Names as wrappers leave them, and configurations as trainers do: the same model, or a word that says which it is."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from retnet_tools.errors import InputError, UsageError
from retnet_tools.formats import Checkpoint, open_checkpoint
from retnet_tools.weights import Array
from tests.formats.cases import CONFORMANCE, SETTINGS, small_tensors, write_torchscale
from tests.formats.test_cases import assert_same_model

FOLDERS = {
    "fla": "fla_base/hf_safetensors",
    "syncdoth": "sd_base_gelu/hf_safetensors",
    "syncdoth-first": "syncdoth_first_biases",
    "xatl": "xatl_affine_rms",
    "torchscale": "dragn_layernorm",
}
WITH_BASE = [name for name in FOLDERS if name != "torchscale"]
LAYERS = ("layers.0.", "blocks.0.")


def example(name: str) -> tuple[dict[str, Array], dict[str, Any], Checkpoint]:
    folder = CONFORMANCE / FOLDERS[name]
    return (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
        open_checkpoint(folder),
    )


def write(folder: Path, tensors: dict[str, Array], document: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("word", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module"])
@pytest.mark.parametrize("name", FOLDERS)
def test_what_wraps_the_blocks_inside_a_model_comes_off(name: str, word: str, tmp_path: Path) -> None:
    tensors, document, plain = example(name)
    inside = {f"{word}.{key}": value for key, value in tensors.items()}
    for mark in LAYERS:
        inside = {key.replace(mark, f"{mark}{word}."): value for key, value in inside.items()}
    assert any(key.count(word) == 2 for key in inside)
    assert_same_model(open_checkpoint(write(tmp_path, inside, document)), plain)


@pytest.mark.parametrize("key", ["ema", "ema_model", "swa_model"])
@pytest.mark.parametrize("name", FOLDERS)
def test_an_average_inside_safetensors_is_noted_and_can_be_chosen(name: str, key: str, tmp_path: Path) -> None:
    tensors, document, plain = example(name)
    average = {f"{key}.{name}": value if "rel_pos" in name else value.copy() for name, value in tensors.items()}
    norm = next(name for name in tensors if name.endswith(("norm.weight", "ln1.weight")))
    average[f"{key}.{norm}"] *= np.float32(0.5)
    folder = write(tmp_path, {**tensors, **average}, document)
    checkpoint = open_checkpoint(folder)
    assert_same_model(checkpoint, plain)
    assert f"the file also holds {key}, an average of these weights: --entry {key} reads it" in checkpoint.notes
    chosen = open_checkpoint(folder, entry=key)
    differing = [
        name
        for name in plain.weights.names()
        if not np.array_equal(chosen.weights.read(name), plain.weights.read(name))
    ]
    assert len(differing) == 1
    with pytest.raises(UsageError, match=f"no entry 'other' .*{key}"):
        open_checkpoint(folder, entry="other")


@pytest.mark.parametrize("wrapper", ["", "module.", "net.backbone."])
@pytest.mark.parametrize("name", WITH_BASE)
def test_a_model_saved_without_its_outermost_part(name: str, wrapper: str, tmp_path: Path) -> None:
    """As `RetNetModel` alone saves it: with tied embeddings it is whole, or the wrapper has the head itself."""
    tensors, document, plain = example(name)
    heads = {key: value for key, value in tensors.items() if key.startswith("lm_head.")}
    base = {wrapper + key.removeprefix("model."): value for key, value in tensors.items() if key not in heads}
    outer = wrapper.rpartition(".")[0].rpartition(".")[0]
    outer = f"{outer}." if outer else ""
    assert heads
    untied = {**document, "tie_word_embeddings": False}
    for place in {outer, wrapper, ""}:
        with_head = {**base, **{place + key: value for key, value in heads.items()}}
        assert_same_model(open_checkpoint(write(tmp_path, with_head, untied)), plain)
    with pytest.raises(InputError, match=r"no tensor '.*lm_head\.weight'"):
        open_checkpoint(write(tmp_path, base, untied))
    without_bias = {"lm_head_bias": False} if name == "xatl" else {}
    tied = open_checkpoint(write(tmp_path, base, {**document, **without_bias, "tie_word_embeddings": True}))
    assert tied.config.tie_word_embeddings
    np.testing.assert_array_equal(tied.weights.read("embedding.weight"), plain.weights.read("embedding.weight"))


@pytest.mark.parametrize("head", ["lm_head.weight", "output_projection.weight"])
@pytest.mark.parametrize(("prefix", "outer"), [("model.", ""), ("module.decoder_stack.", "module.")])
def test_a_wrapper_of_torchscale_may_have_the_output_projection(
    head: str, prefix: str, outer: str, tmp_path: Path
) -> None:
    plain = open_checkpoint(write_torchscale(tmp_path / "plain"))
    tensors = small_tensors()
    outside = {outer + head: tensors.pop("output_projection.weight")}
    wrapped = {prefix + key: value for key, value in tensors.items()} | outside
    assert_same_model(open_checkpoint(write_torchscale(tmp_path / "wrapped", wrapped)), plain)
    two = wrapped | {f"{prefix}output_projection.weight": outside[outer + head]}
    with pytest.raises(InputError, match=f"unknown tensor '{outer}{head}'"):
        open_checkpoint(write_torchscale(tmp_path / "two", two))


def test_of_two_layouts_that_fit_the_one_with_the_shorter_wrapper_is_meant(tmp_path: Path) -> None:
    """A short configuration and a head that its safetensors leave out fit torchscale behind `model.` as well."""
    tensors, document, _ = example("syncdoth")
    sizes = {
        key: value for key, value in document.items() if key not in ("use_glu", "use_lm_decay", "forward_impl")
    } | {"tie_word_embeddings": True}
    del tensors["lm_head.weight"]
    assert open_checkpoint(write(tmp_path, tensors, sizes)).format == "syncdoth/RetNet"


def record(folder: Path, settings: dict[str, Any], beside: dict[str, Any] | None) -> Path:
    """A file of Lightning with its hyperparameters, and a configuration beside it."""
    folder.mkdir()
    state = {name: torch.from_numpy(value) for name, value in small_tensors().items()}
    torch.save({"state_dict": state, "hyper_parameters": settings}, folder / "last.ckpt")
    if beside is not None:
        (folder / "config.json").write_text(json.dumps(beside))
    return folder


def test_what_a_record_in_the_file_leaves_out_is_taken_from_the_configuration_beside_it(tmp_path: Path) -> None:
    beside = {**SETTINGS, "layernorm_eps": 1e-3, "eos_token_id": 5}
    checkpoint = open_checkpoint(record(tmp_path / "partial", SETTINGS, beside))
    assert checkpoint.config.block_norm.eps == 1e-3
    assert checkpoint.settings["eos_token_id"] == 5
    assert [file.name for file in checkpoint.source_files] == ["config.json", "last.ckpt"]
    with pytest.raises(InputError, match="window_attention = 1"):
        open_checkpoint(record(tmp_path / "unknown", SETTINGS, {**beside, "window_attention": 1}))
    with pytest.raises(InputError, match=r"hyper_parameters and config\.json of differing differ in layernorm_eps"):
        open_checkpoint(record(tmp_path / "differing", {**SETTINGS, "layernorm_eps": 1e-6}, beside))


def test_a_named_configuration_takes_the_place_of_a_record_in_the_file(tmp_path: Path) -> None:
    folder = record(tmp_path / "model", SETTINGS, {**SETTINGS, "layernorm_eps": 1e-4})
    named = tmp_path / "named.json"
    named.write_text(json.dumps({**SETTINGS, "layernorm_eps": 1e-3}))
    assert open_checkpoint(folder, config=named).config.block_norm.eps == 1e-3


def test_a_file_of_another_name_does_not_dispute_the_configuration(tmp_path: Path) -> None:
    write_torchscale(tmp_path)
    (tmp_path / "old_config.json").write_text(json.dumps({**SETTINGS, "layernorm_eps": 1e-3}))
    assert open_checkpoint(tmp_path).config.block_norm.eps == 1e-6
    (tmp_path / "args.json").unlink()
    assert open_checkpoint(tmp_path).config.block_norm.eps == 1e-3


@pytest.mark.parametrize("name", WITH_BASE)
def test_a_pickled_configuration_leaves_its_model_type_out(name: str, tmp_path: Path) -> None:
    """`model_type` belongs to the class of transformers' configurations, not to the object."""
    tensors, document, plain = example(name)
    config = Namespace(**{key: value for key, value in document.items() if key != "model_type"})
    state = {key: torch.from_numpy(value) for key, value in tensors.items()}
    torch.save({"model": state, "config": config, "step": 3}, tmp_path / "last.pt")
    assert_same_model(open_checkpoint(tmp_path), plain)
