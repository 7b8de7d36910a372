"""The layouts that projects around RetNet write, against the outputs of those projects' own code.

tests/data/make_conformance.py made the small cases; the larger ones come from the same projects, run elsewhere.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from retnet_tools.config import ScoreClamp
from retnet_tools.errors import InputError, UsageError
from retnet_tools.formats import Checkpoint, open_checkpoint
from retnet_tools.graph.contract import STEP_FILE
from retnet_tools.model.retention import FORMS
from retnet_tools.model.retnet import RetNetOutput, load_model
from retnet_tools.paper import paper_decay, paper_rotary_frequencies
from retnet_tools.weights import Array
from tests import tolerances
from tests.exports import cpu_runner, export, run_steps, zero_states
from tests.formats.cases import CONFORMANCE

XATL, LIT = "syncdoth/RetNet-XATL", "syncdoth/RetNet-XATL (lit)"
FIRST, OCTOBER = "syncdoth/RetNet (until October 2023)", "syncdoth/RetNet (2 October 2023)"
FLA, YAR = "flash-linear-attention", "yet-another-retnet"
CASES = {
    "xatl_410m/hf_bin": XATL,
    "xatl_410m/hf_safetensors": XATL,
    "xatl_410m/hf_converted": XATL,
    "xatl_parallel_residual/hf_bin": XATL,
    "xatl_parallel_residual/hf_safetensors": XATL,
    "xatl_parallel_residual/hf_converted": XATL,
    "xatl_affine_rms": XATL,
    "xatl_affine_layer": XATL,
    "xatl_stability": XATL,
    "xatl_plain_rms": XATL,
    "xatl_deepnorm": XATL,
    "xatl_lit/lit": LIT,
    "xatl_lit_glu/lit": LIT,
    "xatl_lit_shared/lit": LIT,
    "syncdoth_2023_wac81/hf_bin": FIRST,
    "syncdoth_2023_wac81/hf_safetensors": FIRST,
    "syncdoth_first_biases": FIRST,
    "syncdoth_first_tied": FIRST,
    "syncdoth_october": OCTOBER,
    "syncdoth_october_deepnorm": OCTOBER,
    "syncdoth_october_post": OCTOBER,
    "syncdoth_clamps": "syncdoth/RetNet",
    "dragn_rmsnorm/hf_ckpt_0": "torchscale (since October 2023)",
    "dragn_rmsnorm/lightning": "torchscale (since October 2023)",
    "dragn_layernorm": "torchscale (since October 2023, with LayerNorm)",
    "distillation_student/run": "torchscale (in a distillation project)",
    "fla_2024_02": FLA,
    "fla_2024_03": FLA,
    "fla_2024_04": FLA,
    "yar_gutenberg/to_dict_args": YAR,
}
CLAMP_UNTOLD = [case for case in CASES if case.startswith(("syncdoth_clamps", "dragn"))]
NOTED = {"fla_2024_03": "fuse_norm", "xatl_stability": "use_lm_decay and retnet_stability_update"}
# These compute decay, or angles too, at each call: their float64 outputs have them in float64, while a model runs with
# what its code rounds to float32, which is what is read.
DECAY_AT_EACH_CALL = ("fla_2024", "xatl_lit_shared")
ANGLES_AT_EACH_CALL = ("xatl_lit_shared",)
TIED = ("xatl_stability", "syncdoth_2023_wac81", "syncdoth_first_tied", "distillation_student", "fla_2024_04")
TIED += ("syncdoth_october_deepnorm", "syncdoth_october_post")
EXPORTED = ("xatl_affine_rms", "xatl_affine_layer", "syncdoth_first_biases", "distillation_student/run")

each_case = pytest.mark.parametrize("case", CASES)
each_form = pytest.mark.parametrize("form", ["parallel", "recurrent"])


def golden(case: str) -> dict[str, Array]:
    with np.load(CONFORMANCE / case.split("/")[0] / "golden.npz") as arrays:
        return dict(arrays)


def expected(case: str, form: str, suffix: str = "") -> Array:
    """The logits of a form; where its code has no recurrent form and no normalisation, those of the parallel one."""
    arrays = golden(case)
    if f"logits_{form}" not in arrays:
        assert case.startswith(("fla_2024", "xatl_lit_shared"))
        form = "parallel"
    return arrays[f"logits_{form}{suffix}"]


def run(case: str, checkpoint: Checkpoint, form: str, dtype: torch.dtype) -> RetNetOutput:
    model = load_model(checkpoint.config, checkpoint.weights, dtype)
    with torch.no_grad():
        return model(torch.from_numpy(golden(case)["input_ids"]), form=FORMS[form])


def largest(output: torch.Tensor, array: Array) -> float:
    return float(np.abs(output.numpy() - array).max())


def with_exact_schedules(case: str, checkpoint: Checkpoint) -> Checkpoint:
    config = checkpoint.config
    if case.startswith(DECAY_AT_EACH_CALL):
        config = dataclasses.replace(config, decay=paper_decay(config.num_heads))
    if case.startswith(ANGLES_AT_EACH_CALL):
        rotated = sum(angle != 0 for angle in config.rotary_frequencies)
        still = (0.0,) * (len(config.rotary_frequencies) - rotated)
        config = dataclasses.replace(config, rotary_frequencies=(*paper_rotary_frequencies(2 * rotated), *still))
    return dataclasses.replace(checkpoint, config=config)


@each_case
@each_form
def test_float64_logits_are_those_of_the_project(case: str, form: str) -> None:
    checkpoint = with_exact_schedules(case, open_checkpoint(CONFORMANCE / case))
    output = run(case, checkpoint, form, torch.float64)
    assert largest(output.logits, expected(case, form, "_f64")) <= tolerances.GOLDEN_FLOAT64


@each_case
@each_form
def test_float32_logits_are_those_of_the_project(case: str, form: str) -> None:
    output = run(case, open_checkpoint(CONFORMANCE / case), form, torch.float32)
    assert largest(output.logits, expected(case, form)) <= tolerances.GOLDEN_FLOAT32


@each_case
def test_a_checkpoint_tells_its_layout_and_what_is_assumed(case: str) -> None:
    checkpoint = open_checkpoint(CONFORMANCE / case)
    assert checkpoint.format == CASES[case]
    assert checkpoint.assumed_clamp == (case in CLAMP_UNTOLD)
    assert checkpoint.config.tie_word_embeddings == case.startswith(TIED)
    noted = ["clamp" if case in CLAMP_UNTOLD else NOTED.get(case)]
    assert len(checkpoint.notes) == len([word for word in noted if word])
    for note, word in zip(checkpoint.notes, noted, strict=False):
        assert word is not None
        assert word in note


@each_case
def test_tensors_are_what_was_said_of_them_whole_and_in_blocks(case: str) -> None:
    weights = open_checkpoint(CONFORMANCE / case).weights
    for name in weights.names():
        array, info, region = weights.read(name), weights.info(name), weights.region(name)
        assert (array.shape, array.dtype) == (info.shape, info.dtype)
        blocks = np.concatenate([block.reshape(-1) for block in weights.blocks(name)])
        np.testing.assert_array_equal(blocks, array.reshape(-1), err_msg=name, strict=True)
        if region is not None:
            assert region.path.read_bytes()[region.offset : region.offset + region.nbytes] == array.tobytes()


@pytest.mark.parametrize(
    ("clamp", "suffix"), [("sum_of_abs", ""), ("abs_of_sum", "_before_2024")], ids=["since 2024", "before 2024"]
)
def test_the_clamp_that_is_named_is_that_of_the_release(clamp: ScoreClamp, suffix: str) -> None:
    case, arrays = "syncdoth_clamps", golden("syncdoth_clamps")
    checkpoint = open_checkpoint(CONFORMANCE / case, clamp=clamp)
    assert (checkpoint.assumed_clamp, checkpoint.notes) == (False, [])
    parallel = run(case, checkpoint, "parallel", torch.float64).logits
    assert largest(parallel, arrays[f"logits_parallel{suffix}_f64"]) <= tolerances.GOLDEN_FLOAT64
    recurrent = run(case, checkpoint, "recurrent", torch.float64).logits
    assert largest(recurrent, arrays["logits_recurrent_f64"]) <= tolerances.GOLDEN_FLOAT64
    assert np.abs(arrays["logits_parallel_f64"] - arrays["logits_parallel_before_2024_f64"]).max() > 1e-3


def test_a_clamp_that_the_files_tell_is_not_replaced() -> None:
    with pytest.raises(UsageError, match=r"--clamp sum-of-abs; expected abs-of-sum"):
        open_checkpoint(CONFORMANCE / "syncdoth_october", clamp="sum_of_abs")


@pytest.mark.parametrize("path", ["hf_ckpt_0", "lightning"])
def test_states_of_torchscale_in_a_wrapper_are_ours_without_its_scale(path: str) -> None:
    case, arrays = f"dragn_rmsnorm/{path}", golden("dragn_rmsnorm")
    for i, state in enumerate(run(case, open_checkpoint(CONFORMANCE / case), "recurrent", torch.float32).states):
        scale = np.sqrt(arrays[f"state_scale_L{i}"])[None, :, None, None]
        plain_sum = (arrays[f"state_recurrent_L{i}"] * scale).swapaxes(-1, -2)  # [B, H, V, K] -> [B, H, K, V]
        assert largest(state, plain_sum) <= tolerances.GOLDEN_STATES * np.abs(plain_sum).max()


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
def test_the_norm_that_the_codes_of_one_project_share_differently_is_refused_by_name(
    parallel: bool, tmp_path: Path
) -> None:
    for name in ("xatl_shared_norm", "xatl_lit_shared/lit"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for file in (CONFORMANCE / name).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        document = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**document, "parallel_residual": parallel}))
        if parallel and "lit" in name:
            assert open_checkpoint(folder).config.shared_block_norm
            continue
        with pytest.raises(InputError, match="shared_attention_norm = True") as caught:
            open_checkpoint(folder)
        assert len(str(caught.value)) <= 200


def test_what_the_tensors_of_yet_another_retnet_do_not_tell_is_asked_for_by_name(tmp_path: Path) -> None:
    case = "yar_gutenberg/to_dict"
    with pytest.raises(InputError, match="tells activation, norm_first, layer_norm_eps"):
        open_checkpoint(CONFORMANCE / case)
    told = tmp_path / "told.json"
    told.write_text(json.dumps({"activation": "swish", "norm_first": True, "layer_norm_eps": 1e-6}))
    checkpoint = open_checkpoint(CONFORMANCE / case, config=told)
    assert checkpoint.format == YAR
    for form in ("parallel", "recurrent"):
        logits = run(case, checkpoint, form, torch.float64).logits
        assert largest(logits, golden(case)[f"logits_{form}_f64"]) <= tolerances.GOLDEN_FLOAT64


@pytest.mark.parametrize(
    "change",
    [
        {"retnet_bottleneck": 8},
        {"hybrid_attention_layers": [1]},
        {"rotary_percentage": 0.4},
        {"rotary_percentage": 2.0},
        {"use_lm_decay": True},
        {"decoder_normalize_before": False, "subln": True},
        {"parallel_residual": True, "decoder_normalize_before": False, "subln": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_supported_of_xatl_is_refused_by_name(change: dict[str, object], tmp_path: Path) -> None:
    source = CONFORMANCE / "xatl_affine_rms"
    document = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**document, **change}))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    name, value = next(iter(change.items()))
    with pytest.raises(InputError, match=rf"has {name} = {re.escape(str(value))}; expected"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("case", ["xatl_stability", "syncdoth_october_post", "fla_2024_02", "fla_2024_04"])
def test_a_tied_head_that_is_stored_must_be_the_embedding(case: str, tmp_path: Path) -> None:
    state, document = read_folder(CONFORMANCE / case)
    embedding = next(array for name, array in state.items() if "embed" in name and array.ndim == 2)
    for name, head in (("same", embedding.copy()), ("other", embedding[::-1].copy())):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**document, "tie_word_embeddings": True}))
        save_file({**state, "lm_head.weight": head}, folder / "model.safetensors")
    assert open_checkpoint(tmp_path / "same").config.tie_word_embeddings
    with pytest.raises(InputError, match=r"ties the embeddings but 'lm_head\.weight' differs"):
        open_checkpoint(tmp_path / "other")


def read_folder(folder: Path) -> tuple[dict[str, Array], dict[str, object]]:
    document = json.loads((folder / "config.json").read_text())
    if (file := folder / "model.safetensors").exists():
        return load_file(file), document
    state = torch.load(folder / "pytorch_model.bin")
    return {name: tensor.numpy() for name, tensor in state.items()}, document


@pytest.mark.parametrize("case", ["xatl_affine_rms", "xatl_stability", "syncdoth_october", "syncdoth_clamps"])
def test_buffers_that_are_rounded_are_those_that_the_model_makes_and_noted(case: str, tmp_path: Path) -> None:
    state, document = read_folder(CONFORMANCE / case)
    (tmp_path / "config.json").write_text(json.dumps(document))
    half = {name: array.astype(np.float16) if "rel_pos" in name else array for name, array in state.items()}
    save_file(half, tmp_path / "model.safetensors")
    found, expected = open_checkpoint(tmp_path), open_checkpoint(CONFORMANCE / case)
    np.testing.assert_allclose(found.config.decay, expected.config.decay, rtol=1e-6)
    np.testing.assert_allclose(found.config.rotary_frequencies, expected.config.rotary_frequencies, rtol=1e-6)
    assert any("rounded in the file" in note for note in found.notes)
    other = {name: array * np.float32(0.5) if "rel_pos" in name else array for name, array in state.items()}
    save_file(other, tmp_path / "model.safetensors")
    found = open_checkpoint(tmp_path)
    np.testing.assert_allclose(found.config.decay, np.array(expected.config.decay) * 0.5, rtol=1e-6)
    np.testing.assert_allclose(found.config.rotary_frequencies, np.array(expected.config.rotary_frequencies) * 0.5)
    assert any("used as stored" in note for note in found.notes)


def test_names_of_transformers_mean_what_the_attribute_map_of_xatl_says(tmp_path: Path) -> None:
    """`attribute_map` in its hf_retnet/configuration_retnet.py."""
    names = {
        "decoder_embed_dim": "hidden_size",
        "decoder_ffn_embed_dim": "intermediate_size",
        "decoder_retention_heads": "num_attention_heads",
        "decoder_layers": "num_hidden_layers",
    }
    state, document = read_folder(CONFORMANCE / "xatl_affine_rms")
    renamed = {names.get(name, name): value for name, value in document.items()}
    assert renamed.keys() >= set(names.values())
    (tmp_path / "config.json").write_text(json.dumps(renamed))
    save_file(state, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).config == open_checkpoint(CONFORMANCE / "xatl_affine_rms").config


def test_training_files_of_xatl_have_values_of_the_size_of_keys(tmp_path: Path) -> None:
    (file,) = (CONFORMANCE / "xatl_lit/lit").glob("*.pth")
    document = json.loads((file.parent / "config.json").read_text())
    (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**document, "decoder_value_embed_dim": 48}))
    with pytest.raises(InputError, match=r"decoder_value_embed_dim = 48; expected decoder_embed_dim in its"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("case", ["xatl_affine_rms", "xatl_stability", "syncdoth_october", "syncdoth_clamps"])
def test_buffers_that_a_converter_leaves_out_are_those_that_the_model_makes(case: str, tmp_path: Path) -> None:
    state = load_file(CONFORMANCE / case / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if "retnet_rel_pos" not in name}
    assert len(kept) == len(state) - 2
    (tmp_path / "config.json").write_bytes((CONFORMANCE / case / "config.json").read_bytes())
    save_file(kept, tmp_path / "model.safetensors")
    logits = run(case, open_checkpoint(tmp_path), "parallel", torch.float64).logits
    assert largest(logits, golden(case)["logits_parallel_f64"]) <= tolerances.GOLDEN_FLOAT64


@pytest.mark.parametrize("dialect", ["February", "March"])
def test_the_keys_and_names_of_2024_mean_what_today_s_do(dialect: str, tmp_path: Path) -> None:
    source = CONFORMANCE / "fla_base/hf_safetensors"
    document, state = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    document["rms_norm_eps"] = document.pop("norm_eps")
    if dialect == "February":
        document["num_attention_heads"] = document.pop("num_heads")
        state["model.embed_tokens.weight"] = state.pop("model.embeddings.weight")
    for i in range(document["num_hidden_layers"]):
        gate, up = (f"model.layers.{i}.mlp.{name}_proj.weight" for name in ("gate", "up"))
        state[gate] = np.concatenate([state[gate], state.pop(up)])
    (tmp_path / "config.json").write_text(json.dumps(document))
    save_file(state, tmp_path / "model.safetensors")
    arrays = golden("fla_base")
    for form in ("parallel", "recurrent"):
        logits = run("fla_base", open_checkpoint(tmp_path), form, torch.float64).logits
        assert largest(logits, arrays[f"logits_{form}_f64"]) <= tolerances.GOLDEN_FLOAT64


def test_the_first_release_of_fla_is_read_with_the_activation_that_its_code_had(tmp_path: Path) -> None:
    """16 February 2024: gate and up projections apart, both of the blocks' activations by `hidden_act`."""
    state, document = read_folder(CONFORMANCE / "fla_2024_02")
    for name in [name for name in state if name.endswith("mlp.gate_proj.weight")]:
        state[name], state[name.replace("gate_proj", "up_proj")] = map(np.ascontiguousarray, np.split(state[name], 2))
    plain = {name.replace("g_norm_swish_gate", "g_norm"): array for name, array in state.items()}
    for word, tensors in (("swish", state), ("gelu", plain)):
        (tmp_path / word).mkdir()
        (tmp_path / word / "config.json").write_text(json.dumps({**document, "hidden_act": word}))
        save_file(tensors, tmp_path / word / "model.safetensors")
    read = open_checkpoint(tmp_path / "swish")
    assert read.config == open_checkpoint(CONFORMANCE / "fla_2024_02").config
    with pytest.raises(InputError, match="hidden_act = 'gelu'; expected swish in the release of 16 February 2024"):
        open_checkpoint(tmp_path / "gelu")


def test_shared_heads_had_another_name_in_2024(tmp_path: Path) -> None:
    source = CONFORMANCE / "fla_mqa_noaffine/hf_safetensors"
    state, document = read_folder(source)
    names = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps"}
    renamed = {names.get(name, name): value for name, value in document.items()}
    assert renamed["num_key_value_heads"] != renamed["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(renamed))
    save_file(state, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).config == open_checkpoint(source).config


@pytest.mark.parametrize("case", EXPORTED)
def test_the_exported_step_graph_gives_the_logits_of_the_project(case: str, tmp_path: Path) -> None:
    checkpoint, arrays = open_checkpoint(CONFORMANCE / case), golden(case)
    config = checkpoint.config
    runner = cpu_runner(export(config, checkpoint.weights, tmp_path / "out", ops="standard") / STEP_FILE)
    for n, (logits, _) in enumerate(run_steps(runner, arrays["input_ids"], zero_states(config, 2))):
        np.testing.assert_allclose(logits, arrays["logits_recurrent"][:, n], rtol=0, atol=tolerances.GOLDEN_FLOAT32)
