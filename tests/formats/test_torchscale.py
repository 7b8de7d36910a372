"""torchscale checkpoints against the outputs of torchscale's own code.

The float64 golden outputs come from a model built in float32 and cast up, so its rotary and decay buffers are rounded
to float32, as the model's own are, and to float16 in ts_fp16, which we do not follow.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from retnet_tools.errors import InputError
from retnet_tools.formats import Checkpoint, open_checkpoint
from retnet_tools.formats.files import CheckpointFiles
from retnet_tools.model.retention import FORMS
from retnet_tools.model.retnet import RetNetOutput, load_model
from retnet_tools.paper import paper_decay, paper_rotary_frequencies
from tests import tolerances
from tests.formats.cases import (
    CONFORMANCE,
    SETTINGS,
    TORCHSCALE_FILES,
    case,
    case_id,
    golden,
    small_tensors,
    write_torchscale,
)

EVERY_FILE = pytest.mark.parametrize("file", TORCHSCALE_FILES, ids=case_id)
FLOAT16_FILES = [file for file in TORCHSCALE_FILES if "fp16" in file.parent.name]
FLOAT32_FILES = [file for file in TORCHSCALE_FILES if file not in FLOAT16_FILES]
CURRENT_FLOAT32_FILES = [file for file in FLOAT32_FILES if "tsold" not in file.parent.name]


def run(checkpoint: Checkpoint, file: Path, form: str, dtype: torch.dtype) -> RetNetOutput:
    model = load_model(checkpoint.config, checkpoint.weights, dtype)
    with torch.no_grad():
        return model(torch.from_numpy(golden(file)["input_ids"]), form=FORMS[form])


def largest(output: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(output.numpy() - expected).max())


@pytest.mark.parametrize("file", FLOAT32_FILES, ids=case_id)
@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_float64_logits_equal_those_of_torchscale(file: Path, form: str) -> None:
    output = run(open_checkpoint(file), file, form, torch.float64)
    assert largest(output.logits, golden(file)[f"logits_{form}_f64"]) <= tolerances.GOLDEN_FLOAT64


@pytest.mark.parametrize("file", FLOAT16_FILES, ids=case_id)
@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_float64_logits_equal_those_of_torchscale_once_its_rounded_buffers_are_put_in(file: Path, form: str) -> None:
    checkpoint = open_checkpoint(file)
    tensors = CheckpointFiles(file).tensors
    config = dataclasses.replace(
        checkpoint.config,
        rotary_frequencies=tuple(tensors.read("decoder.retnet_rel_pos.angle")[::2].astype(float).tolist()),
        decay=tuple(tensors.read("decoder.retnet_rel_pos.decay").astype(float).tolist()),
    )
    output = run(dataclasses.replace(checkpoint, config=config), file, form, torch.float64)
    assert largest(output.logits, golden(file)[f"logits_{form}_f64"]) <= tolerances.GOLDEN_FLOAT64


@pytest.mark.parametrize("file", FLOAT32_FILES, ids=case_id)
def test_the_schedules_in_exact_float64_move_logits_by_what_torchscale_states(file: Path) -> None:
    checkpoint = open_checkpoint(file)
    config = checkpoint.config
    exact = dataclasses.replace(
        config,
        decay=paper_decay(config.num_heads),
        rotary_frequencies=paper_rotary_frequencies(config.head_k_dim),
    )
    output = run(dataclasses.replace(checkpoint, config=exact), file, "parallel", torch.float64)
    stated = case(file)["self_disagreement"]["parallel_f64: float32 buffers vs float64 buffers"]
    found = largest(output.logits, golden(file)["logits_parallel_f64"])
    assert abs(found - stated) <= tolerances.STATED_DISAGREEMENT


@pytest.mark.parametrize("file", FLOAT32_FILES, ids=case_id)
@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_float32_logits_equal_those_of_torchscale(file: Path, form: str) -> None:
    output = run(open_checkpoint(file), file, form, torch.float32)
    assert largest(output.logits, golden(file)[f"logits_{form}"]) <= tolerances.GOLDEN_FLOAT32


@pytest.mark.parametrize("file", FLOAT16_FILES, ids=case_id)
def test_half_precision_file_equals_torchscale_with_exact_buffers(file: Path) -> None:
    output = run(open_checkpoint(file), file, "parallel", torch.float32)
    assert largest(output.logits, golden(file)["logits_parallel_exact_buffers"]) <= tolerances.GOLDEN_FLOAT32


@pytest.mark.parametrize("file", FLOAT32_FILES, ids=case_id)
def test_states_are_those_of_torchscale_without_its_scale(file: Path) -> None:
    arrays = golden(file)
    output = run(open_checkpoint(file), file, "recurrent", torch.float32)
    for i, state in enumerate(output.states):
        scale = np.sqrt(arrays[f"state_scale_L{i}"])[None, :, None, None]
        plain_sum = (arrays[f"state_recurrent_L{i}"] * scale).swapaxes(-1, -2)  # [B, H, V, K] -> [B, H, K, V]
        assert largest(state, plain_sum) <= tolerances.GOLDEN_STATES * np.abs(plain_sum).max()


@pytest.mark.parametrize("file", CURRENT_FLOAT32_FILES, ids=case_id)
def test_abs_of_sum_is_the_clamp_of_pypi_030(file: Path) -> None:
    checkpoint = open_checkpoint(file)
    scores = dataclasses.replace(checkpoint.config.score_normalization, clamp="abs_of_sum")
    config = dataclasses.replace(checkpoint.config, score_normalization=scores)
    output = run(dataclasses.replace(checkpoint, config=config), file, "parallel", torch.float32)
    assert largest(output.logits, golden(file)["logits_parallel_pypi030"]) <= tolerances.GOLDEN_FLOAT32


@EVERY_FILE
def test_a_checkpoint_tells_its_release_and_its_files(file: Path) -> None:
    checkpoint = open_checkpoint(file)
    old = "tsold" in file.parent.name
    assert checkpoint.format == f"torchscale ({'before' if old else 'since'} October 2023)"
    assert checkpoint.source_files == [file.parent / "args.json", file]
    assert any("rounded in the file" in note for note in checkpoint.notes) == ("fp16" in file.parent.name)


def test_other_schedules_in_the_file_are_used_and_noted(tmp_path: Path) -> None:
    tensors = small_tensors()
    tensors["retnet_rel_pos.decay"] = np.log(np.array([0.9, 0.95], dtype=np.float32))
    checkpoint = open_checkpoint(write_torchscale(tmp_path, tensors))
    assert checkpoint.config.decay == tuple(float(g) for g in tensors["retnet_rel_pos.decay"])
    assert any("differs from the published schedules" in note for note in checkpoint.notes)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("angle", [1, 1, 0.1], r"retnet_rel_pos\.angle' has shape \[3\]; expected \[4\]"),
        ("angle", [1, 0.5, 0.1, 0.1], "pairs of different angles"),
        ("decay", [0.5, -1], "decay"),
    ],
)
def test_broken_buffers_are_refused(tmp_path: Path, name: str, values: list[float], message: str) -> None:
    tensors = small_tensors()
    tensors[f"retnet_rel_pos.{name}"] = np.array(values, dtype=np.float32)
    with pytest.raises(InputError, match=message):
        open_checkpoint(write_torchscale(tmp_path, tensors))


def test_files_without_buffers_get_the_published_schedules(tmp_path: Path) -> None:
    tensors = {name: value for name, value in small_tensors().items() if "retnet_rel_pos" not in name}
    config = open_checkpoint(write_torchscale(tmp_path, tensors)).config
    np.testing.assert_allclose(config.decay, paper_decay(2), rtol=1e-7)
    np.testing.assert_allclose(config.rotary_frequencies, paper_rotary_frequencies(4), rtol=1e-7)


@pytest.mark.parametrize("missing", ["angle", "decay"])
def test_of_two_buffers_the_one_that_is_stored_is_used(missing: str, tmp_path: Path) -> None:
    tensors, name = small_tensors(), f"retnet_rel_pos.{missing}"
    tensors["retnet_rel_pos.angle"] = np.array([0.5, 0.5, 0.25, 0.25], dtype=np.float32)
    tensors["retnet_rel_pos.decay"] = np.array([-0.5, -0.25], dtype=np.float32)
    published = small_tensors()[name]
    expected = tensors | {name: published}
    del tensors[name]
    checkpoint = open_checkpoint(write_torchscale(tmp_path, tensors))
    config = checkpoint.config
    np.testing.assert_allclose(config.rotary_frequencies, expected["retnet_rel_pos.angle"][::2], rtol=1e-6)
    np.testing.assert_allclose(config.decay, expected["retnet_rel_pos.decay"], rtol=1e-6)
    assert len(checkpoint.notes) == 1
    assert "used as stored" in checkpoint.notes[0]


def test_a_file_that_does_not_tell_its_clamp_is_noted(tmp_path: Path) -> None:
    unsaid = {k: v for k, v in SETTINGS.items() if k != "torchscale_version"}
    checkpoint = open_checkpoint(write_torchscale(tmp_path / "unsaid", settings=unsaid))
    assert checkpoint.config.score_normalization.clamp == "sum_of_abs"
    assert checkpoint.assumed_clamp
    assert any("--clamp" in note for note in checkpoint.notes)
    said = {**SETTINGS, "torchscale_version": "0.3.0"}
    checkpoint = open_checkpoint(write_torchscale(tmp_path / "said", settings=said))
    assert checkpoint.config.score_normalization.clamp == "abs_of_sum"
    assert not checkpoint.assumed_clamp
    assert checkpoint.notes == []


@pytest.mark.parametrize("name", ["model.pt", "weights.pth", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["", "decoder.", "module.decoder.", "module.model.decoder."])
def test_container_and_wrapper_do_not_matter(tmp_path: Path, name: str, prefix: str) -> None:
    write_torchscale(tmp_path, small_tensors(prefix), name=name)
    weights = open_checkpoint(tmp_path).weights
    tensors = small_tensors()
    np.testing.assert_array_equal(weights.read("layers.1.ffn.gate_proj.weight"), tensors["layers.1.ffn.fc1.weight"])
    np.testing.assert_array_equal(weights.read("layers.1.ffn.up_proj.weight"), tensors["layers.1.ffn.gate.weight"])


@pytest.mark.parametrize("prefix", ["", "model.", "module.decoder."])
def test_a_tensor_outside_what_wraps_the_model_is_refused(prefix: str, tmp_path: Path) -> None:
    beside = {"value_head.weight": np.ones((2, 2), np.float32)}
    file = write_torchscale(tmp_path / "beside", small_tensors(prefix) | beside)
    with pytest.raises(InputError, match=r"unknown tensor 'value_head\.weight'"):
        open_checkpoint(file)
    count = {"n_averaged": np.array(3)}
    averaged = open_checkpoint(write_torchscale(tmp_path / "averaged", small_tensors(prefix) | count))
    assert averaged.config == open_checkpoint(write_torchscale(tmp_path / "plain")).config


def test_two_models_under_two_prefixes_are_named(tmp_path: Path) -> None:
    file = write_torchscale(tmp_path, small_tensors("student.") | small_tensors("teacher."))
    with pytest.raises(InputError, match=r"weights under 'student\.' and 'teacher\.'; expected one torchscale"):
        open_checkpoint(file)


@pytest.mark.parametrize("where", ["cfg_dict", "cfg_namespace", "args"])
def test_fairseq_files_of_all_ages(tmp_path: Path, where: str) -> None:
    model = {**{k: v for k, v in SETTINGS.items() if k != "vocab_size"}, "no_scale_embedding": None}
    state = {name: torch.from_numpy(value) for name, value in small_tensors("decoder.").items()}
    state["decoder.version"] = torch.tensor([3.0])
    namespace = argparse.Namespace(**model)
    tree = {
        "cfg_dict": {"args": None, "cfg": {"model": model}},
        "cfg_namespace": {"args": None, "cfg": {"model": namespace}},
        "args": {"args": namespace},
    }[where]
    tree["extra_state"] = {"metrics": [np.float64(1.5), np.float32(2)]}
    torch.save({**tree, "model": state}, tmp_path / "checkpoint_best.pt")
    config = open_checkpoint(tmp_path).config
    assert config.embedding_scale == 8**0.5
    assert config.block_norm.eps == 1e-6


def test_deepnorm_is_post_norm_exactly_where_the_final_norm_is_absent(tmp_path: Path) -> None:
    settings = {**SETTINGS, "deepnorm": True, "subln": False}
    pre = open_checkpoint(write_torchscale(tmp_path / "pre", settings=settings)).config
    assert (pre.norm_order, pre.final_norm, pre.residual_alpha) == ("pre", True, 4**0.25)
    tensors = small_tensors()
    del tensors["layer_norm.weight"]
    post = open_checkpoint(write_torchscale(tmp_path / "post", tensors, settings)).config
    assert (post.norm_order, post.final_norm, post.residual_alpha) == ("post", False, 4**0.25)


def test_a_pre_norm_model_without_its_final_norm_is_incomplete(tmp_path: Path) -> None:
    tensors = small_tensors()
    del tensors["layer_norm.weight"]
    with pytest.raises(InputError, match=r"'layer_norm\.weight'.*'final_norm\.weight'"):
        open_checkpoint(write_torchscale(tmp_path, tensors))


def test_a_tied_projection_is_dropped_when_equal_and_refused_when_not(tmp_path: Path) -> None:
    settings = {**SETTINGS, "share_decoder_input_output_embed": True}
    tensors = small_tensors()
    with pytest.raises(InputError, match=r"differs from 'embed_tokens\.weight'"):
        open_checkpoint(write_torchscale(tmp_path / "different", tensors, settings))
    equal = {**tensors, "output_projection.weight": tensors["embed_tokens.weight"].copy()}
    del tensors["output_projection.weight"]
    for name, state in (("equal", equal), ("absent", tensors)):
        checkpoint = open_checkpoint(write_torchscale(tmp_path / name, state, settings))
        assert "lm_head.weight" not in checkpoint.weights.names()
    shared = {name: torch.from_numpy(value) for name, value in equal.items()}
    shared["output_projection.weight"] = shared["embed_tokens.weight"]
    torch.save(shared, tmp_path / "equal" / "model.pt")
    assert open_checkpoint(tmp_path / "equal").config.tie_word_embeddings


@pytest.mark.parametrize(
    "change",
    [
        {"moe_freq": 2, "moe_expert_count": 4},
        {"use_xmoe": True},
        {"multiway": True},
        {"no_output_layer": True},
        {"decoder_input_dim": 4},
        {"decoder_output_dim": 4},
        {"activation_fn": "tanh"},
        {"vocab_size": 8},
        {"decoder_layers": "two"},
        {"decoder_layers": 0},
        {"decoder_layers": 10**12},
        {"decoder_embed_dim": 10**12},
        {"layernorm_eps": -1.0},
        {"deepnorm": "yes"},
        {"decoder_retention_heads": 3},
        {"decoder_retention_heads": 9},
    ],
    ids=lambda change: next(iter(change)),
)
def test_unsupported_settings_are_refused_by_name(tmp_path: Path, change: dict[str, object]) -> None:
    field = next(iter(change))
    name = {"decoder_layers": "layers"}.get(field, field)
    with pytest.raises(InputError, match=name) as caught:
        open_checkpoint(write_torchscale(tmp_path, settings={**SETTINGS, **change}))
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)


def test_the_size_of_v_is_fixed_before_october_2023(tmp_path: Path) -> None:
    source = CONFORMANCE / "tsold_subln"
    document = json.loads((source / "args.json").read_text())
    (tmp_path / "model.pt").write_bytes((source / "model_bare.pt").read_bytes())
    size = 2 * document["decoder_embed_dim"]
    (tmp_path / "args.json").write_text(json.dumps({**document, "decoder_value_embed_dim": size}))
    assert open_checkpoint(tmp_path).config.value_dim == size
    (tmp_path / "args.json").write_text(json.dumps({**document, "decoder_value_embed_dim": size // 2}))
    with pytest.raises(InputError, match=r"decoder_value_embed_dim = .*twice decoder_embed_dim"):
        open_checkpoint(tmp_path)


def test_a_record_in_the_file_and_a_configuration_beside_it_are_read_together(tmp_path: Path) -> None:
    def write(folder: Path, record: dict[str, object], **beside: object) -> Path:
        state = {name: torch.from_numpy(value) for name, value in small_tensors().items()}
        folder.mkdir()
        torch.save({"model": state, "args": argparse.Namespace(**record)}, folder / "model.pt")
        (folder / "args.json").write_text(json.dumps(beside))
        return folder

    told = {"layernorm_eps": 1e-3, "eos_token_id": 5}
    checkpoint = open_checkpoint(write(tmp_path / "both", SETTINGS, **SETTINGS, **told))
    assert checkpoint.config.block_norm.eps == 1e-3
    assert [file.name for file in checkpoint.source_files] == ["args.json", "model.pt"]
    assert checkpoint.settings["eos_token_id"] == 5
    # fairseq's defaults hold for its own record, whatever lies beside it.
    untold = {name: value for name, value in SETTINGS.items() if name != "activation_fn"}
    assert open_checkpoint(write(tmp_path / "left out", untold, **untold)).config.feed_forward.activation == "silu"
    differ = write(tmp_path / "differ", {**SETTINGS, "layernorm_eps": 1e-4}, **SETTINGS, **told)
    with pytest.raises(InputError, match="differ in layernorm_eps; expected one; name it with --config"):
        open_checkpoint(differ)
    assert open_checkpoint(differ, config=differ / "args.json").config.block_norm.eps == 1e-3
    (differ / "args.json").rename(tmp_path / "named.json")
    assert open_checkpoint(differ).config.block_norm.eps == 1e-4
    assert open_checkpoint(differ, config=tmp_path / "named.json").config.block_norm.eps == 1e-3


def test_several_different_configurations_are_refused(tmp_path: Path) -> None:
    file = write_torchscale(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**SETTINGS, "layernorm_eps": 1e-3}))
    with pytest.raises(InputError, match=r"config\.json and args\.json of model\.pt differ in layernorm_eps"):
        open_checkpoint(file)
