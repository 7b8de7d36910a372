"""From one format to another and back: bit for bit, or refused by the field that cannot be expressed."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retnet_tools.config import BlockNorm, FeedForward, HeadNorm, RetNetConfig, ScoreNormalization
from retnet_tools.errors import InputError, UsageError
from retnet_tools.formats import FORMATS, open_checkpoint, writable_format
from retnet_tools.formats.conversion import plan_checkpoint, plan_conversion, write_checkpoint
from retnet_tools.formats.files import CheckpointFiles
from retnet_tools.formats.schedules import floats, paper_log_decay, rope_frequencies
from retnet_tools.formats.spec import Writing
from retnet_tools.model.retention import FORMS
from retnet_tools.model.retnet import load_model
from retnet_tools.weights import WeightSource
from tests.formats.cases import CONFORMANCE, TORCHSCALE_FILES, case_id, small_tensors, write_torchscale
from tests.helpers import ABLATIONS, BASE, random_source, random_tokens

WRITABLE = [spec.name for spec in FORMATS if spec.write is not None]


def convert(config: RetNetConfig, weights: WeightSource, target: str, out: Path, **options: object) -> Path:
    plan = plan_conversion(config, weights, writable_format(target), **options)
    write_checkpoint(out, plan, force=True, progress=None)
    return out


def assert_same_weights(a: WeightSource, b: WeightSource) -> None:
    assert list(a.names()) == list(b.names())
    for name in a.names():
        x, y = a.read(name), b.read(name)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8), err_msg=name)


def expressible(target: str, config: RetNetConfig) -> bool:
    try:
        plan_conversion(config, random_source(config, 0), writable_format(target))
    except UsageError:
        return False
    return True


@pytest.mark.parametrize("target", WRITABLE)
@pytest.mark.parametrize("name", ABLATIONS)
def test_a_model_comes_back_bit_for_bit_or_is_refused_by_field(target: str, name: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=1)
    if not expressible(target, config):
        with pytest.raises(UsageError, match=f"{target} cannot express( this model)?: "):
            convert(config, source, target, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    out = convert(config, source, target, tmp_path / "out")
    back = open_checkpoint(out)
    assert back.config == config
    assert_same_weights(back.weights, source)


def test_torchscale_expresses_what_torchscale_has() -> None:
    assert expressible("torchscale", BASE)
    assert {name for name, config in ABLATIONS.items() if expressible("torchscale", config)} >= {
        "base",
        "tied",
        "post_norm",
        "pre_norm_alpha",
        "silu_glu",
        "abs_of_sum",
        "embedding_norm",
        "no_decay",
        "one_gamma",
    }


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"gate": None}, "gate"),
        ({"head_norm": HeadNorm("rms", 1e-6, "channel")}, "head_norm.weight"),
        ({"block_norm": BlockNorm("rms", 1e-5)}, "head_norm.eps"),
        ({"feed_forward": FeedForward("glu", 40, "gelu", bias=True)}, "feed_forward.bias"),
        ({"score_normalization": ScoreNormalization(1.0, True, "sum_of_abs")}, "score_normalization.key_scale"),
    ],
)
def test_the_field_that_torchscale_cannot_express_is_named(change: dict[str, object], field: str) -> None:
    config = dataclasses.replace(BASE, **change)
    with pytest.raises(UsageError, match=f"torchscale cannot express: {field}"):
        plan_conversion(config, random_source(config, 2), writable_format("torchscale"))


FLA_SHAPED = dataclasses.replace(
    BASE,
    decay=floats(paper_log_decay(4)),
    rotary_frequencies=floats(rope_frequencies(8)),
    score_normalization=ScoreNormalization(8**-0.5, by_decay=False, clamp="none"),
    head_norm=HeadNorm("rms", 1e-6, "shared"),
    feed_forward=FeedForward("glu", 40, "silu"),
)


def exact_schedules(config: RetNetConfig) -> RetNetConfig:
    """The published schedules in float64."""
    pairs = config.head_k_dim // 2
    return dataclasses.replace(
        config,
        decay=tuple(math.log1p(-(2.0 ** (-5 - h))) for h in range(config.num_heads)),
        rotary_frequencies=tuple(10000.0 ** (-i / pairs) for i in range(pairs)),
    )


@pytest.mark.parametrize("head_k_dim", [8, 96, 100, 256, 1000])
def test_schedules_that_float32_rounds_are_written_to_fla_and_noted(head_k_dim: int, tmp_path: Path) -> None:
    size = 4 * head_k_dim
    scores = ScoreNormalization(head_k_dim**-0.5, by_decay=False, clamp="none")
    config = exact_schedules(
        dataclasses.replace(
            FLA_SHAPED,
            num_layers=1,
            hidden_size=size,
            key_dim=size,
            rotary_frequencies=(1.0,) * (head_k_dim // 2),
            score_normalization=scores,
        )
    )
    source = random_source(config, seed=7)
    canonical = open_checkpoint(convert(config, source, "canonical", tmp_path / "in"))
    plan = plan_checkpoint(canonical, writable_format("fla"), dtype=None, max_shard_size=10**9)
    write_checkpoint(tmp_path / "out", plan, force=False, progress=None)
    notes = [f"fla computes {name} in float32" for name in ("decay", "rotary_frequencies")]
    assert [note[: len(start)] for note, start in zip(plan.notes, notes, strict=True)] == notes
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(start in card for start in notes)
    back = open_checkpoint(tmp_path / "out")
    assert back.config != config
    np.testing.assert_allclose(back.config.rotary_frequencies, config.rotary_frequencies, rtol=4 * 2.0**-23, atol=0)
    assert_same_weights(back.weights, source)


def test_a_model_of_fla_itself_is_written_without_a_note(tmp_path: Path) -> None:
    assert plan_conversion(FLA_SHAPED, random_source(FLA_SHAPED, 7), writable_format("fla")).notes == ()


@pytest.mark.parametrize("field", ["decay", "rotary_frequencies"])
@pytest.mark.parametrize(("steps", "passes"), [(3.9, True), (4.1, False), (-3.9, True), (-4.1, False)])
def test_a_schedule_is_equal_within_four_float32_steps(field: str, steps: float, passes: bool) -> None:
    first, *others = getattr(FLA_SHAPED, field)
    other = dataclasses.replace(FLA_SHAPED, **{field: (first, others[0] * (1 + steps * 2.0**-23), *others[1:])})
    assert expressible("fla", other) is passes
    if not passes:
        with pytest.raises(UsageError, match=f"^fla cannot express: {field}; "):
            plan_conversion(other, random_source(other, 0), writable_format("fla"))


def test_no_decay_is_not_a_rounded_decay() -> None:
    tiny = dataclasses.replace(FLA_SHAPED, decay=(0.0, *FLA_SHAPED.decay[1:]))
    assert not expressible("fla", tiny)


def test_a_layout_that_lacks_a_tensor_is_found_before_it_is_written() -> None:
    def write(config: RetNetConfig, assumed_clamp: bool) -> Writing:
        whole = torchscale.write(config, assumed_clamp)
        names = {stored: name for stored, name in whole.names.items() if "k_proj" not in stored}
        return dataclasses.replace(whole, names=names)

    torchscale = writable_format("torchscale")
    target = dataclasses.replace(torchscale, write=write)
    with pytest.raises(InputError, match=r"no tensor 'layers\.0\.retention\.k_proj\.weight'"):
        plan_conversion(BASE, random_source(BASE, 1), target)


def test_a_refusal_lists_every_field_in_one_line() -> None:
    with pytest.raises(UsageError) as caught:
        plan_conversion(BASE, random_source(BASE, 2), writable_format("fla"))
    assert str(caught.value) == (
        "fla cannot express: rotary_frequencies, score_normalization.by_decay = True (False), "
        "score_normalization.clamp = 'sum_of_abs' ('none'), feed_forward.activation = 'gelu' ('silu'); "
        "it would read what is in brackets; convert to another format"
    )


@pytest.mark.parametrize("clamp", ["abs_of_sum", "sum_of_abs"])
@pytest.mark.parametrize("target", ["canonical", "torchscale", "syncdoth"])
def test_a_named_clamp_is_kept(target: str, clamp: str, tmp_path: Path) -> None:
    original = CONFORMANCE / "sd_base_gelu" / "hf_safetensors"
    named = open_checkpoint(original, clamp=clamp)
    assert not named.assumed_clamp
    back = open_checkpoint(convert(named.config, named.weights, target, tmp_path / "out"))
    assert back.config == named.config
    assert back.config.score_normalization.clamp == clamp
    assert not back.assumed_clamp


@pytest.mark.parametrize("source", ["sd_base_gelu/hf_safetensors", "dragn_rmsnorm/hf_ckpt_0"])
@pytest.mark.parametrize("target", ["canonical", "torchscale", "syncdoth"])
def test_an_assumed_clamp_stays_assumed(target: str, source: str, tmp_path: Path) -> None:
    original = open_checkpoint(CONFORMANCE / source)
    assert original.assumed_clamp
    plan = plan_checkpoint(original, writable_format(target), dtype=None, max_shard_size=10**9)
    write_checkpoint(tmp_path / "out", plan, force=False, progress=None)
    back = open_checkpoint(tmp_path / "out")
    assert (back.assumed_clamp, back.config) == (True, original.config)
    assert open_checkpoint(tmp_path / "out", clamp="abs_of_sum").config.score_normalization.clamp == "abs_of_sum"


def test_an_assumed_clamp_is_said_in_the_card(tmp_path: Path) -> None:
    original = open_checkpoint(CONFORMANCE / "sd_base_gelu" / "hf_safetensors")
    assert original.assumed_clamp
    plan = plan_checkpoint(original, writable_format("canonical"), dtype=None, max_shard_size=10**9)
    write_checkpoint(tmp_path / "out", plan, force=False, progress=None)
    assert any("sum_of_abs is assumed" in note for note in plan.notes)
    assert "sum_of_abs is assumed" in (tmp_path / "out" / "README.md").read_text()


OWN_FORMATS = {"ts": "torchscale", "sd": "syncdoth", "fla": "fla"}
HF_FOLDERS = sorted(
    path.parent
    for path in CONFORMANCE.glob("*/hf_*/config.json")
    if path.parent.parent.name.split("_")[0] in OWN_FORMATS
)


@pytest.mark.parametrize("file", [*TORCHSCALE_FILES, *HF_FOLDERS], ids=case_id)
def test_a_public_checkpoint_survives_the_way_through_canonical(file: Path, tmp_path: Path) -> None:
    target = OWN_FORMATS[file.parent.name.split("_")[0].removesuffix("old")]
    first = open_checkpoint(file)
    canonical = open_checkpoint(convert(first.config, first.weights, "canonical", tmp_path / "canonical"))
    again = open_checkpoint(convert(canonical.config, canonical.weights, target, tmp_path / "again"))
    assert first.config == canonical.config == again.config
    assert_same_weights(first.weights, canonical.weights)
    assert_same_weights(first.weights, again.weights)


@pytest.mark.parametrize("folder", HF_FOLDERS, ids=case_id)
def test_what_is_written_has_the_tensors_of_the_original_file(folder: Path, tmp_path: Path) -> None:
    target = {"sd": "syncdoth", "fl": "fla"}[folder.parent.name[:2]]
    checkpoint = open_checkpoint(folder)
    out = convert(checkpoint.config, checkpoint.weights, target, tmp_path / "out")
    original, written = CheckpointFiles(folder).tensors, CheckpointFiles(out).tensors
    missing = set(original.names()) - set(written.names())
    assert missing <= ({"lm_head.weight"} if checkpoint.config.tie_word_embeddings else set())
    for name in written.names():
        np.testing.assert_array_equal(written.read(name), original.read(name), err_msg=name)
    config = json.loads((folder / "config.json").read_text())
    wrote = json.loads((out / "config.json").read_text())
    assert {k: v for k, v in wrote.items() if config.get(k) is not None and v != config[k]} == {}


@pytest.mark.parametrize("target", WRITABLE)
def test_progress_is_of_every_byte_that_is_written(target: str, tmp_path: Path) -> None:
    config = next(config for config in (ABLATIONS["tied"], FLA_SHAPED) if expressible(target, config))
    plan = plan_conversion(config, random_source(config, 6), writable_format(target))
    told: list[int] = []
    write_checkpoint(tmp_path / "out", plan, force=False, progress=told.append)
    assert sum(told) == plan.nbytes


def test_torch_loads_the_state_dict_and_shares_tied_tensors(tmp_path: Path) -> None:
    config = ABLATIONS["tied"]
    source = random_source(config, seed=3)
    state = torch.load(convert(config, source, "torchscale", tmp_path / "out") / "model.pt", weights_only=True)
    assert state["output_projection.weight"].data_ptr() == state["embed_tokens.weight"].data_ptr()
    np.testing.assert_array_equal(state["layers.1.ffn.fc1.weight"], source.read("layers.1.ffn.gate_proj.weight"))
    assert state["retnet_rel_pos.angle"].shape == (config.head_k_dim,)


@pytest.mark.parametrize("target", WRITABLE)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_types_change_as_numpy_rounds(target: str, dtype: str, tmp_path: Path) -> None:
    if not expressible(target, BASE):
        pytest.skip(f"{target} cannot express the base configuration")
    source = random_source(BASE, seed=4, dtype=np.float64)
    weights = open_checkpoint(convert(BASE, source, target, tmp_path / "out", dtype=dtype)).weights
    for name in weights.names():
        found = weights.read(name)
        assert found.dtype.name == dtype
        np.testing.assert_array_equal(found, source.read(name).astype(found.dtype))


@st.composite
def torchscale_configs(draw: st.DrawFn) -> RetNetConfig:
    heads = draw(st.sampled_from([1, 2, 3, 5]))
    head_k_dim = draw(st.sampled_from([2, 4, 6]))
    alpha = draw(st.booleans())
    layers = draw(st.integers(1, 3))
    eps = draw(st.sampled_from([1e-6, 1e-5, 1e-3]))
    gammas = draw(st.lists(st.floats(0.5, 1.0, exclude_max=True), min_size=heads, max_size=heads))
    return dataclasses.replace(
        BASE,
        num_layers=layers,
        num_heads=heads,
        hidden_size=heads * head_k_dim,
        key_dim=heads * head_k_dim,
        value_dim=heads * draw(st.integers(1, 5)),
        vocab_size=draw(st.integers(3, 20)),
        decay=tuple(float(np.log(g)) for g in gammas),
        rotary_frequencies=tuple(draw(st.floats(0.0, 3.0)) for _ in range(head_k_dim // 2)),
        score_normalization=ScoreNormalization(
            head_k_dim**-0.5, True, draw(st.sampled_from(["sum_of_abs", "abs_of_sum"]))
        ),
        head_norm=HeadNorm("rms", eps),
        block_norm=BlockNorm("rms", eps),
        feed_forward=FeedForward("glu", draw(st.integers(1, 9)), draw(st.sampled_from(["gelu", "silu", "relu"]))),
        norm_order=(order := draw(st.sampled_from(["pre", "post"]))),
        final_norm=order == "pre",
        residual_alpha=(2.0 * layers) ** 0.25 if alpha else 1.0,
        embedding_scale=draw(st.sampled_from([1.0, (heads * head_k_dim) ** 0.5])),
        embedding_norm=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )


@st.composite
def syncdoth_configs(draw: st.DrawFn) -> RetNetConfig:
    config = draw(torchscale_configs())
    alpha = 1.0 if config.norm_order == "pre" else config.residual_alpha
    config = dataclasses.replace(config, residual_alpha=alpha)
    if draw(st.booleans()):
        return config
    eps = config.block_norm.eps
    norm = draw(st.sampled_from([BlockNorm("rms", eps), BlockNorm("layer", eps, bias=True)]))
    sub_norm = norm if config.norm_order == "pre" and draw(st.booleans()) else None
    ffn = FeedForward("plain", 7, config.feed_forward.activation, bias=True, norm=sub_norm)
    return dataclasses.replace(config, feed_forward=ffn)


@st.composite
def fla_configs(draw: st.DrawFn) -> RetNetConfig:
    groups, kv_heads = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    heads, head_k_dim = groups * kv_heads, draw(st.sampled_from([2, 4, 8]))
    eps = draw(st.sampled_from([1e-6, 1e-5]))
    activations = st.sampled_from(["silu", "gelu", "relu", "relu2", "sigmoid", "tanh"])
    return dataclasses.replace(
        BASE,
        num_layers=draw(st.integers(1, 2)),
        num_heads=heads,
        num_kv_groups=groups,
        hidden_size=heads * head_k_dim,
        key_dim=heads * head_k_dim,
        value_dim=heads * draw(st.integers(1, 5)) * 2,
        vocab_size=draw(st.integers(3, 20)),
        decay=floats(paper_log_decay(heads)),
        rotary_frequencies=floats(rope_frequencies(head_k_dim)),
        score_normalization=ScoreNormalization(head_k_dim**-0.5, by_decay=False, clamp="none"),
        head_norm=HeadNorm("rms", eps, draw(st.sampled_from(["shared", "none"]))),
        block_norm=BlockNorm("rms", eps),
        feed_forward=FeedForward("glu", draw(st.integers(1, 9)), "silu"),
        feature_map=draw(st.none() | activations),
        gate=draw(st.none() | activations),
        tie_word_embeddings=draw(st.booleans()),
    )


STRATEGIES = {"torchscale": torchscale_configs(), "syncdoth": syncdoth_configs(), "fla": fla_configs()}


@pytest.mark.parametrize("target", STRATEGIES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), seed=st.integers(0, 99))
def test_any_model_of_a_format_makes_the_round_trip(
    target: str, data: st.DataObject, seed: int, tmp_path: Path
) -> None:
    config = data.draw(STRATEGIES[target])
    source = random_source(config, seed)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    back = open_checkpoint(convert(config, source, target, tmp_path / "out"))
    assert back.config == config
    assert_same_weights(back.weights, source)
    ids = torch.from_numpy(random_tokens(config, 1, 5, seed))
    with torch.no_grad():
        logits = [
            load_model(config, weights, torch.float32)(ids, form=FORMS["parallel"]).logits
            for weights in (source, back.weights)
        ]
    assert torch.equal(*logits)


def test_card_licences_and_tokenizer_travel(tmp_path: Path) -> None:
    source = convert(BASE, random_source(BASE, 5), "canonical", tmp_path / "in")
    (source / "README.md").write_text("# My model\n")
    (source / "LICENSE.txt").write_text("free")
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"eos_token_id": 1}')
    checkpoint = open_checkpoint(source)
    plan = plan_checkpoint(checkpoint, writable_format("torchscale"), dtype=None, max_shard_size=10**9)
    write_checkpoint(tmp_path / "out", plan, force=False, progress=None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("# My model\n")
    assert "## Provenance" in card
    for file in checkpoint.source_files:
        assert f"`{file.name}`, {file.stat().st_size} bytes" in card
    for name in ("LICENSE.txt", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": 1}
    assert (source / "README.md").read_text() == "# My model\n"


@pytest.mark.parametrize("target", ["canonical", "torchscale"])
def test_tensors_that_lie_otherwise_in_their_file_are_written_as_they_read(target: str, tmp_path: Path) -> None:
    state = {name: torch.from_numpy(array) for name, array in small_tensors().items()}
    for name, tensor in state.items():
        if tensor.dim() == 2:
            state[name] = tensor.t().contiguous().t()
    assert not state["layers.0.ffn.fc1.weight"].is_contiguous()
    plain = open_checkpoint(write_torchscale(tmp_path / "plain"))
    torch.save(state, tmp_path / "plain" / "model.pt")
    checkpoint = open_checkpoint(tmp_path / "plain")
    back = open_checkpoint(convert(checkpoint.config, checkpoint.weights, target, tmp_path / "out"))
    for name, array in small_tensors().items():
        if "fc1" in name:
            canonical = name.replace("fc1", "gate_proj")
            np.testing.assert_array_equal(back.weights.read(canonical), array)
    assert back.config == plain.config


def test_an_unreadable_tensor_leaves_nothing(tmp_path: Path) -> None:
    source = convert(BASE, random_source(BASE, 6), "canonical", tmp_path / "in")
    checkpoint = open_checkpoint(source)
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate(4000)
    with pytest.raises(InputError, match="ends"):
        convert(checkpoint.config, checkpoint.weights, "canonical", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_replaced_leaves_nothing_that_would_be_read_beside_the_new_one(tmp_path: Path) -> None:
    source, canonical, names = random_source(BASE, 1), writable_format("canonical"), []
    for size, target in ((20_000, canonical), (10**9, canonical), (10**9, writable_format("torchscale"))):
        plan = plan_conversion(BASE, source, target, max_shard_size=size)
        assert plan.marker.endswith(("config.json", "args.json"))
        write_checkpoint(tmp_path / "out", plan, force=True, progress=None)
        names.append(sorted(file.name for file in (tmp_path / "out").iterdir()))
        assert names[-1] == sorted(plan.files)
    assert len(names[0]) > len(names[1]) == len(names[2])
