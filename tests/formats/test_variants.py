"""What the configurations of the Hugging Face formats and of the small implementations can say beside the conformance
cases: what is read, and what is refused by name before any tensor is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from retnet_tools.config import BlockNorm, RetNetConfig
from retnet_tools.errors import InputError
from retnet_tools.formats import Checkpoint, open_checkpoint
from retnet_tools.formats.fla import KEYS as FLA_KEYS
from retnet_tools.formats.fla import resolve as resolve_fla
from retnet_tools.formats.settings import Settings
from retnet_tools.formats.spec import Source
from retnet_tools.formats.storage import StoredTensors, TensorLocation
from retnet_tools.formats.syncdoth import resolve as resolve_syncdoth
from retnet_tools.weights import Array
from tests.formats.cases import CONFORMANCE

FLA, SYNCDOTH = CONFORMANCE / "fla_base/hf_safetensors", CONFORMANCE / "sd_base_gelu/hf_safetensors"
OCTOBER = CONFORMANCE / "syncdoth_october"
YAR, JAMIE = CONFORMANCE / "yar_base", CONFORMANCE / "js_base"


def changed(source: Path, folder: Path, change: dict[str, Any], tensors: dict[str, Array | None] | None = None) -> Path:
    """A copy of a case with other settings and tensors; None takes a tensor or setting away."""
    folder.mkdir(exist_ok=True)
    name = "config.json" if (source / "config.json").exists() else "args.json"
    document = {**json.loads((source / name).read_text()), **change}
    (folder / name).write_text(json.dumps(document))
    if (source / "model.safetensors").exists():
        state = {**load_file(source / "model.safetensors"), **(tensors or {})}
        save_file({k: v for k, v in state.items() if v is not None}, folder / "model.safetensors")
    else:
        state = {**torch.load(source / "model.pt"), **(tensors or {})}
        torch.save({k: torch.as_tensor(v) for k, v in state.items() if v is not None}, folder / "model.pt")
    return folder


@pytest.mark.parametrize(
    ("source", "change", "match"),
    [
        (FLA, {"attn": {"layers": [0], "num_heads": 2}}, r"attn = .*retention in every layer.*not supported"),
        (FLA, {"attnres_block_size": 4}, r"attnres_block_size = 4"),
        (FLA, {"hidden_act": "powlu"}, "hidden_act = 'powlu'"),
        (FLA, {"hidden_act": "maxout"}, "hidden_act = 'maxout'; expected one of swish"),
        (FLA, {"feature_map": "softmax"}, "feature_map = 'softmax'"),
        (FLA, {"num_kv_heads": 2}, "num_kv_heads = 2"),
        (FLA, {"expand_k": 0.3}, r"expand_k = 0\.3"),
        (FLA, {"expand_v": 0}, "expand_v = 0"),
        (FLA, {"num_heads": 16}, "head_k_dim is 3"),
        (FLA, {"vocab_size": "many"}, "vocab_size"),
        (FLA, {"norm_eps": 10**400}, "norm_eps = 1000.*; expected a number >= 0"),
        (FLA, {"norm_eps": float("inf")}, "Infinity, which is no number of JSON"),
        (FLA, {"hidden_size": 10**400}, "hidden_size = 1000.*; expected a positive integer"),
        (FLA, {"num_heads": 1 << 40, "hidden_size": 1 << 41}, "num_heads = 1099511627776|hidden_size = 2199023255552"),
        (FLA, {"hidden_ratio": 1e308, "intermediate_size": None}, "out of range"),
        (SYNCDOTH, {"activation_fn": "tanh"}, "activation_fn = 'tanh'"),
        (SYNCDOTH, {"decoder_retention_heads": 5}, "decoder_retention_heads = 5"),
        (SYNCDOTH, {"vocab_size": 98}, r"embed_tokens.*shape \[97, 48\]"),
        (OCTOBER, {"use_glu": True}, "use_glu = True; expected no gate in a configuration with value_factor"),
        (OCTOBER, {"decoder_value_embed_dim": 24}, "decoder_value_embed_dim = 24; expected value_factor times 24 = 48"),
        (YAR, {"activation": "tanh"}, "activation = 'tanh'"),
        (YAR, {"nhead": 5}, "nhead = 5"),
        (YAR, {"nhead": 6}, r"thetas' has shape \[16\]"),
        (JAMIE, {"heads": 5}, "heads = 5"),
        (JAMIE, {"heads": 6}, "heads = 6; expected hidden_dim = 36 over the 12 columns"),
        (JAMIE, {"layers": 3}, r"no tensor .*\.2\."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_and_wrong_settings_are_refused_by_name(
    source: Path, change: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=match) as caught:
        open_checkpoint(changed(source, tmp_path / "changed", change))
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "tensors", "match"),
    [
        (FLA, {"model.layers.0.attn.q_conv1d.weight": np.ones((48, 1, 4), np.float32)}, "no short convolutions"),
        (YAR, {"decoder.layers.0.retention.thetas": None}, "without relative positions is not supported"),
        (JAMIE, {"retentions.0.retentions.0.theta": np.ones(12, np.float32)}, "complex-valued RetNet"),
        (JAMIE, {"retentions.0.W_G": np.ones((36, 36), np.complex64)}, "complex-valued tensors"),
        (JAMIE, {"retentions.0.retentions.0.W_Q": None}, "no matrix 'retentions.0.retentions.0.W_Q'"),
    ],
    ids=["convolution", "no angles", "theta", "complex", "no heads"],
)
def test_unsupported_tensors_are_refused_by_name(
    source: Path, tensors: dict[str, Array | None], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(source, tmp_path / "changed", {"use_short_conv": True} if source == FLA else {}, tensors)

    def refuse(_: TensorLocation) -> Array:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(TensorLocation, "read", refuse)
    with pytest.raises(InputError, match=match) as caught:
        open_checkpoint(folder)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("source", "names", "values", "match"),
    [
        (YAR, "decoder.layers.{}.retention.thetas", np.arange(16), "pairs of different angles"),
        (YAR, "decoder.layers.1.retention.thetas", np.arange(16), r"layers\.1\.retention\.thetas' differs"),
        (JAMIE, "retentions.{}.retentions.1.xpos.scale", np.full(6, 0.5), r"retentions\.1\.xpos\.scale' differs"),
        (JAMIE, "retentions.1.retentions.0.xpos.scale", np.full(6, 0.5), r"retentions\.0\.xpos\.scale' differs"),
    ],
    ids=["pairs", "layer", "head", "layer and head"],
)
def test_buffers_of_no_such_model_are_refused(
    source: Path, names: str, values: Array, match: str, tmp_path: Path
) -> None:
    tensors: dict[str, Array | None] = {names.format(i): values.astype(np.float32) for i in range(2)}
    with pytest.raises(InputError, match=match):
        open_checkpoint(changed(source, tmp_path / "x", {}, tensors))


@pytest.mark.parametrize("name", ["lm_head.bias", "out_scale", "layers.0.extra.weight", "model.extra.weight"])
@pytest.mark.parametrize(
    "source",
    [FLA, SYNCDOTH, OCTOBER, YAR, JAMIE, CONFORMANCE / "syncdoth_first_biases", CONFORMANCE / "xatl_affine_rms"],
    ids=["fla", "syncdoth", "october", "yar", "jamie", "first", "xatl"],
)
def test_a_tensor_that_the_model_has_no_place_for_is_refused(source: Path, name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"tensor '{name}'"):
        open_checkpoint(changed(source, tmp_path / "x", {}, {name: np.ones(3, np.float32)}))


@pytest.mark.parametrize(
    ("source", "name", "shape"),
    [
        (SYNCDOTH, "model.layernorm_embedding.weight", (48,)),
        (CONFORMANCE / "xatl_stability", "lm_head.bias", (31,)),
        (CONFORMANCE / "xatl_stability", "model.layers.0.retention.q_proj.bias", (24,)),
        (CONFORMANCE / "xatl_stability", "model.layers.0.retention.group_norm.weight", (9,)),
        (CONFORMANCE / "syncdoth_first_tied", "model.blocks.0.msr.qkv.bias", (88,)),
        (FLA, "model.layers.0.attn.g_norm.weight", (16,)),
        (OCTOBER, "model.layers.0.ffn.gate.weight", (32, 24)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_that_the_format_has_and_the_configuration_leaves_out_is_refused(
    source: Path, name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"unknown tensor '{name}'"):
        open_checkpoint(changed(source, tmp_path / "x", {}, {name: np.ones(shape, np.float32)}))


def test_a_state_dict_without_its_arguments(tmp_path: Path) -> None:
    shutil.copy(JAMIE / "model.pt", tmp_path)
    assert open_checkpoint(tmp_path).config == open_checkpoint(JAMIE).config
    shutil.copy(YAR / "model.pt", tmp_path)
    with pytest.raises(InputError, match=r"tells activation, norm_first, layer_norm_eps.*args\.json"):
        open_checkpoint(tmp_path)


def test_values_of_twice_the_size_are_told_by_the_tensors(tmp_path: Path) -> None:
    """`double_v_dim`: W_V of a head is `[D, 2K]`, W_G `[D, 2D]`, W_O `[2D, D]`."""
    state, base = torch.load(JAMIE / "model.pt"), open_checkpoint(JAMIE).config
    assert base.value_dim == base.hidden_size
    for name, tensor in state.items():
        if name.endswith(("W_V", "W_G")):
            state[name] = torch.cat([tensor, tensor], dim=1)
        elif "W_O" in name or "group_norm" in name:
            state[name] = torch.cat([tensor, tensor])
    torch.save(state, tmp_path / "model.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.config.value_dim, checkpoint.config.key_dim) == (2 * base.value_dim, base.key_dim)
    assert checkpoint.weights.read("layers.0.retention.v_proj.weight").shape == (2 * base.hidden_size, base.hidden_size)


def test_short_convolutions_that_the_model_ignores_are_ignored(tmp_path: Path) -> None:
    assert open_checkpoint(changed(FLA, tmp_path / "x", {"use_short_conv": True})).config == open_checkpoint(FLA).config


@pytest.mark.parametrize("source", [FLA, SYNCDOTH], ids=["fla", "syncdoth"])
def test_a_tied_head_is_dropped_when_equal_or_absent_and_refused_when_not(source: Path, tmp_path: Path) -> None:
    embedding = next(n for n in load_file(source / "model.safetensors") if "embed" in n)
    values = load_file(source / "model.safetensors")[embedding]
    for name, head in (("equal", values), ("absent", None)):
        folder = changed(source, tmp_path / name, {"tie_word_embeddings": True}, {"lm_head.weight": head})
        checkpoint = open_checkpoint(folder)
        assert checkpoint.config.tie_word_embeddings
        assert "lm_head.weight" not in checkpoint.weights.names()
    with pytest.raises(InputError, match=r"ties the embeddings but 'lm_head\.weight' differs"):
        open_checkpoint(changed(source, tmp_path / "different", {"tie_word_embeddings": True}))


def fla(**values: Any) -> RetNetConfig:
    return resolve_fla(Settings("fla", {"hidden_size": 48, "num_heads": 3, **values}))


def test_flash_linear_attention_defaults_and_nulls() -> None:
    assert (fla().value_dim, fla().feed_forward.dim, fla().head_norm.weight) == (96, 256, "shared")
    assert fla(hidden_ratio=None, hidden_size=240).feed_forward.dim == 768
    assert fla(hidden_ratio=2, hidden_size=1200).feed_forward.dim == 1792
    assert fla(elementwise_affine=None).head_norm.weight == "none"
    assert fla(use_output_gate=False).gate is None
    assert (fla(hidden_act="gelu").gate, fla(hidden_act="gelu").feed_forward.activation) == ("gelu", "silu")
    assert fla(feature_map="relu").feature_map == "relu"
    assert fla(num_kv_heads=1).num_kv_groups == 3
    assert fla(expand_k=0.5, expand_v=1.5).head_k_dim == 8
    assert fla(expand_v=1.7).value_dim == 81  # int(48 * 1.7), as its code has it


def test_flash_linear_attention_of_2024_has_other_defaults_and_keys(tmp_path: Path) -> None:
    old = Settings.declared("fla", {"hidden_size": 240, "num_attention_heads": 3}, FLA_KEYS)
    assert resolve_fla(old).feed_forward.dim == 768
    plain = open_checkpoint(FLA)
    with_kernel = open_checkpoint(changed(FLA, tmp_path / "may", {"share_conv_kernel": True, "conv_size": 4}))
    assert with_kernel.config == plain.config


@pytest.mark.parametrize(
    ("change", "name"),
    [({"fuse_norm": False}, "g_norm"), ({"hidden_act": "gelu"}, "g_norm"), ({"use_output_gate": False}, "g_norm")],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_head_norm_has_another_name_where_it_is_not_fused(
    change: dict[str, Any], name: str, tmp_path: Path
) -> None:
    state = load_file(FLA / "model.safetensors")
    moved: dict[str, Array | None] = {}
    for i in range(2):
        fused = f"model.layers.{i}.attn.g_norm_swish_gate.weight"
        moved |= {fused: None, f"model.layers.{i}.attn.{name}.weight": state[fused]}
        if "use_output_gate" in change:
            moved[f"model.layers.{i}.attn.g_proj.weight"] = None
    weights = open_checkpoint(changed(FLA, tmp_path / "x", change, moved)).weights
    expected = state["model.layers.1.attn.g_norm_swish_gate.weight"]
    np.testing.assert_array_equal(weights.read("layers.1.retention.head_norm.weight"), expected)


def test_the_merged_feed_forward_matrix_of_first_releases_is_split(tmp_path: Path) -> None:
    state = load_file(FLA / "model.safetensors")
    moved: dict[str, Array | None] = {}
    for i in range(2):
        gate, up = (f"model.layers.{i}.mlp.{name}_proj.weight" for name in ("gate", "up"))
        moved |= {gate: np.concatenate([state[gate], state[up]]), up: None}
    merged, split = open_checkpoint(changed(FLA, tmp_path / "x", {}, moved)).weights, open_checkpoint(FLA).weights
    assert list(merged.names()) == list(split.names())
    for name in split.names():
        assert merged.info(name) == split.info(name)
        read = merged.read(name)
        assert read.base is None or read.base.nbytes == read.nbytes
        np.testing.assert_array_equal(read, split.read(name))
    moved["model.layers.1.mlp.gate_proj.weight"] = state["model.layers.1.mlp.gate_proj.weight"]
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.gate_proj\.weight' has shape"):
        open_checkpoint(changed(FLA, tmp_path / "mixed", {}, moved))
    up = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(InputError, match=f"no tensor '{up}'"):
        open_checkpoint(changed(FLA, tmp_path / "incomplete", {}, {up: None}))


def syncdoth(**values: Any) -> RetNetConfig:
    sizes = {"decoder_embed_dim": 48, "decoder_retention_heads": 3, "decoder_value_embed_dim": 72}
    return resolve_syncdoth(Source(StoredTensors({}), Settings("syncdoth", {**sizes, **values})))


def test_syncdoth_settles_its_flags_as_its_code_does() -> None:
    default = syncdoth()
    assert (default.norm_order, default.final_norm, default.feed_forward.kind) == ("pre", True, "glu")
    post = syncdoth(decoder_normalize_before=False, subln=False)
    assert (post.norm_order, post.final_norm, post.residual_alpha) == ("post", False, 1.0)
    deep = syncdoth(deepnorm=True, subln=False, decoder_normalize_before=False, use_glu=False)
    # What its classes turn off when a model is made is never stored as on.
    for never in (
        {"decoder_normalize_before": False},
        {"deepnorm": True, "subln": True},
        {"deepnorm": True, "decoder_normalize_before": True},
    ):
        with pytest.raises(InputError, match="turns it"):
            syncdoth(**never)
    assert (deep.norm_order, deep.residual_alpha, deep.feed_forward.norm) == ("post", 24**0.25, None)
    assert syncdoth(use_glu=False).feed_forward.norm == BlockNorm("layer", 1e-6, bias=True)
    assert syncdoth(use_glu=False, use_ffn_rms_norm=True).feed_forward.norm == BlockNorm("rms", 1e-6)
    assert syncdoth(use_glu=False, subln=False).feed_forward.norm is None
    assert syncdoth(no_scale_embedding=False).embedding_scale == 48**0.5
    assert syncdoth(layernorm_embedding=True).embedding_norm


def test_the_plain_feed_forward_of_syncdoth_has_biases_and_a_norm(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    state: dict[str, Array | None] = {}
    for i in range(2):
        ffn = f"model.layers.{i}.ffn"
        state[f"{ffn}.gate.weight"] = None
        sizes = {"fc1.bias": 80, "fc2.bias": 48, "ffn_layernorm.weight": 80, "ffn_layernorm.bias": 80}
        state |= {f"{ffn}.{name}": rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    checkpoint = open_checkpoint(changed(SYNCDOTH, tmp_path / "x", {"use_glu": False}, state))
    assert checkpoint.config.feed_forward.norm == BlockNorm("layer", 1e-6, bias=True)
    for stored, canonical in (("fc1.bias", "up_proj.bias"), ("ffn_layernorm.bias", "norm.bias")):
        read = checkpoint.weights.read(f"layers.1.ffn.{canonical}")
        np.testing.assert_array_equal(read, state[f"model.layers.1.ffn.{stored}"])


def as_bfloat16(source: Path, folder: Path) -> Checkpoint:
    if (source / "model.safetensors").exists():
        state = load_file(source / "model.safetensors")
        return open_checkpoint(changed(source, folder, {}, {k: v.astype(ml_dtypes.bfloat16) for k, v in state.items()}))
    state = torch.load(source / "model.pt")
    return open_checkpoint(changed(source, folder, {}, {k: v.bfloat16() for k, v in state.items()}))


@pytest.mark.parametrize("source", [FLA, SYNCDOTH, YAR, JAMIE], ids=["fla", "syncdoth", "yar", "jamie"])
def test_schedules_rounded_in_half_precision_files_are_computed_again(source: Path, tmp_path: Path) -> None:
    half, full = as_bfloat16(source, tmp_path / "half"), open_checkpoint(source)
    np.testing.assert_allclose(half.config.decay, full.config.decay, rtol=1e-7)
    np.testing.assert_allclose(half.config.key_decay, full.config.key_decay, rtol=3e-7)
    np.testing.assert_allclose(half.config.rotary_frequencies, full.config.rotary_frequencies, rtol=1e-7)
    assert any("rounded in the file" in note for note in half.notes) == (source != FLA)
    name = "layers.1.retention.q_proj.weight"
    np.testing.assert_array_equal(half.weights.read(name), full.weights.read(name).astype(ml_dtypes.bfloat16))


def test_norms_of_yet_another_retnet_close_the_branch_where_they_are_not_first(tmp_path: Path) -> None:
    config = open_checkpoint(changed(YAR, tmp_path / "x", {"norm_first": False, "activation": "gelu"})).config
    assert (config.norm_order, config.final_norm, config.gate) == ("branch", False, "gelu")
