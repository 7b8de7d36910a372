"""No key of a configuration is misread in silence: changed, it changes the model, is refused, or is said to do nothing.

What a changed key should do is judged elsewhere (the implementations' own outputs); here no key may have no effect at
all without a word, unless its format declares that it cannot touch the mathematics.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from retnet_tools.errors import InputError, UsageError
from retnet_tools.formats import FORMATS, Checkpoint, open_checkpoint
from retnet_tools.formats.canonical import write_canonical
from retnet_tools.formats.settings import Keys, Settings
from retnet_tools.formats.spec import FormatSpec
from tests.formats.cases import CONFORMANCE
from tests.helpers import BASE, random_source

EXAMPLES = {
    "canonical": None,
    "torchscale": "ts_base_gelu/model_bare.pt",
    "torchscale, old": "tsold_subln/model_bare.pt",
    "torchscale in transformers": "dragn_rmsnorm/hf_ckpt_0",
    "syncdoth": "sd_base_gelu/hf_safetensors",
    "syncdoth-first": "syncdoth_2023_wac81/hf_safetensors",
    "xatl": "xatl_410m/hf_safetensors",
    "xatl, gated": "xatl_parallel_residual/hf_safetensors",
    "fla": "fla_base/hf_safetensors",
    "yet-another-retnet": "yar_base",
    "jamie-stirling": "js_base",
}
# Keys that are read and yet may hold another value without another model or a word, and why.
SILENT = {
    ("fla", "hidden_ratio"): "intermediate_size is stated",
    ("syncdoth", "subln"): "it means the initial distribution alone where the feed-forward network is gated",
    ("torchscale", "subln"): "the same",
    ("torchscale in transformers", "subln"): "the same",
    ("torchscale", "torchscale_version"): "but for 0.3.0 they are one model",
    ("torchscale, old", "torchscale_version"): "the tensors tell the release",
    ("xatl, gated", "subln"): "as syncdoth's",
}


def example(name: str, folder: Path) -> Path:
    """A copy of an example, its configuration in a file of its own."""
    source = EXAMPLES[name]
    if source is None:
        write_canonical(folder, BASE, random_source(BASE, seed=0))
        return folder / "config.json"
    path = CONFORMANCE / source
    place = path.parent if path.is_file() else path
    folder.mkdir()
    for file in (*([path] if path.is_file() else place.glob("*model*")), *place.glob("*.json")):
        if file.name not in ("case.json", "generation_config.json"):
            shutil.copy(file, folder)
    return next(file for file in folder.glob("*.json"))


def changes(value: Any) -> Iterator[Any]:
    """Other values that a key might hold."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, 2 * value + 1)
    elif isinstance(value, float):
        yield from (2 * value + 0.125, value + 1.0)
    elif isinstance(value, str):
        yield "another"
    elif value is None:
        yield from (1, True, "another", [0], 0.5)
    elif isinstance(value, list):
        yield ["another"]
    else:
        yield {"another": 1}


def spec_of(name: str) -> FormatSpec:
    known = {spec.name: spec for spec in FORMATS}
    return known[name.split(",")[0].split(" in ")[0]]


def model(checkpoint: Checkpoint) -> tuple[Any, ...]:
    """What makes a model of given tensors: the configuration, and which tensor is which."""
    return checkpoint.config, [(name, checkpoint.weights.info(name)) for name in checkpoint.weights.names()]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_changed_key_changes_the_model_or_is_refused_or_said_to_do_nothing(name: str, tmp_path: Path) -> None:
    config_file = example(name, tmp_path / "checkpoint")
    document = json.loads(config_file.read_text())
    base, keys = open_checkpoint(config_file.parent), spec_of(name).keys
    silent = []
    for key, value in document.items():
        for other in changes(value):
            config_file.write_text(json.dumps({**document, key: other}))
            try:
                changed = open_checkpoint(config_file.parent)
            except InputError:
                continue
            said = any(key in note for note in changed.notes if note not in base.notes)
            if model(changed) == model(base) and not said and key not in keys.inert and (name, key) not in SILENT:
                silent.append((key, value, other))
    assert silent == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_key_that_nobody_knows_is_refused_unless_it_is_neutral_or_answered_for(name: str, tmp_path: Path) -> None:
    config_file = example(name, tmp_path / "checkpoint")
    document, base = json.loads(config_file.read_text()), model(open_checkpoint(config_file.parent))
    for value in (True, 1, 0.5, "on", [1], {"a": 1}):
        config_file.write_text(json.dumps({**document, "window_attention": value}))
        with pytest.raises(InputError, match=r"window_attention = .*--ignore-key window_attention"):
            open_checkpoint(config_file.parent)
        assert model(open_checkpoint(config_file.parent, ignore_keys=["window_attention"])) == base
    for neutral in (None, False, 0, 0.0, "", [], {}):
        config_file.write_text(json.dumps({**document, "window_attention": neutral}))
        assert model(open_checkpoint(config_file.parent)) == base


@pytest.mark.parametrize("name", EXAMPLES)
def test_keys_of_transformers_that_make_another_model_are_refused(name: str, tmp_path: Path) -> None:
    config_file = example(name, tmp_path / "checkpoint")
    document = json.loads(config_file.read_text())
    for key, value in (
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("cross_attention_hidden_size", 32),
        ("pruned_heads", {"0": [1]}),
        ("tie_encoder_decoder", True),
    ):
        config_file.write_text(json.dumps({**document, key: value}))
        with pytest.raises(InputError, match=rf"{key} = "):
            open_checkpoint(config_file.parent)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_key_of_another_type_is_refused(name: str, tmp_path: Path) -> None:
    config_file = example(name, tmp_path / "checkpoint")
    document, keys = json.loads(config_file.read_text()), spec_of(name).keys
    for key in document.keys() & keys.read:
        if (name, key) in SILENT:
            continue
        config_file.write_text(json.dumps({**document, key: {"a": []}}))
        with pytest.raises(InputError):
            open_checkpoint(config_file.parent)


@pytest.mark.parametrize(
    ("kind", "default", "values"),
    [
        ("count", 1, (True, False, 0, -1, 2.0, "2", [2], 1 << 25)),
        ("number", 1.0, (True, False, -1e-9, "1", [1.0], float("nan"), float("inf"))),
        ("flag", True, (2, -1, 1.0, "true", "", [], {})),
        ("text", "", (1, True, ["a"], {})),
    ],
    ids=["count", "number", "flag", "text"],
)
def test_values_of_another_type_or_out_of_range_are_refused(kind: str, default: Any, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(InputError, match="has size = "):
            getattr(Settings("made up", {"size": value}), kind)("size", default)
    assert getattr(Settings("made up", {"size": None}), kind)("size", default) == default


def test_0_and_1_are_truth_values() -> None:
    settings = Settings("made up", {"on": 1, "off": 0})
    assert (settings.flag("on", False), settings.flag("off", True)) == (True, False)


@pytest.mark.parametrize("spec", FORMATS, ids=lambda spec: spec.name)
def test_a_key_is_declared_once(spec: FormatSpec) -> None:
    groups = [spec.keys.read, frozenset(spec.keys.only), spec.keys.inert, frozenset(spec.keys.aliases)]
    for i, group in enumerate(groups):
        for other in groups[i + 1 :]:
            assert group & other <= {"model_type"}
    assert set(spec.keys.aliases.values()) <= spec.keys.read


def test_older_names_are_read_and_two_that_differ_are_refused(tmp_path: Path) -> None:
    config_file = example("fla", tmp_path / "checkpoint")
    document = json.loads(config_file.read_text())
    eps = document.pop("norm_eps")
    config_file.write_text(json.dumps({**document, "rms_norm_eps": 3e-4}))
    assert open_checkpoint(config_file.parent).config.block_norm.eps == 3e-4
    config_file.write_text(json.dumps({**document, "rms_norm_eps": 3e-4, "norm_eps": eps}))
    with pytest.raises(InputError, match=r"rms_norm_eps = 0\.0003 and norm_eps = "):
        open_checkpoint(config_file.parent)
    config_file.write_text(json.dumps({**document, "rms_norm_eps": "small"}))
    with pytest.raises(InputError, match="rms_norm_eps = 'small'"):
        open_checkpoint(config_file.parent)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "canonical"])
def test_what_a_trainer_keeps_beside_the_model_is_no_reason_to_refuse(name: str, tmp_path: Path) -> None:
    config_file = example(name, tmp_path / "checkpoint")
    document, base = json.loads(config_file.read_text()), model(open_checkpoint(config_file.parent))
    options = {"lr": 1e-3, "batch_size": 8, "weight_decay": 0.1, "betas": [0.9, 0.98], "epochs": 3, "seed": 1}
    made = {"_target_": "models.RetNet", "_class_path": "models.RetNet", "_instantiator": "lightning.pytorch.cli"}
    config_file.write_text(json.dumps({**options, **made, **document}))
    assert model(open_checkpoint(config_file.parent)) == base


def test_a_near_key_is_suggested(tmp_path: Path) -> None:
    config_file = example("fla", tmp_path / "checkpoint")
    document = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**document, "expand_kk": 2}))
    with pytest.raises(InputError, match=r"expand_kk = 2; expected only keys .*; did you mean 'expand_k'"):
        open_checkpoint(config_file.parent)


def test_an_older_name_without_a_value_is_no_second_value(tmp_path: Path) -> None:
    config_file = example("fla", tmp_path / "checkpoint")
    document, base = json.loads(config_file.read_text()), model(open_checkpoint(config_file.parent))
    heads, eps = document["num_heads"], document["norm_eps"]
    for more in ({"num_key_value_heads": None, "num_kv_heads": heads}, {"rms_norm_eps": eps, "norm_eps": None}):
        config_file.write_text(json.dumps({**document, **more}))
        assert model(open_checkpoint(config_file.parent)) == base


@pytest.mark.parametrize("key", ["norm_eps", "rms_norm_eps"])
def test_a_key_that_is_read_cannot_be_ignored(key: str, tmp_path: Path) -> None:
    config_file = example("fla", tmp_path / "checkpoint")
    with pytest.raises(UsageError, match=f"--ignore-key {key}; expected a key that flash-linear-attention does not"):
        open_checkpoint(config_file.parent, ignore_keys=[key])


def test_a_reader_that_asks_for_what_its_format_does_not_declare_is_found() -> None:
    settings = Settings.declared("made up", {"size": 3}, Keys(read=frozenset({"size"})))
    assert settings.count("size") == 3
    with pytest.raises(AssertionError, match="does not declare 'width'"):
        settings.count("width", 1)


# What `PretrainedConfig().to_dict()` of transformers 4.47 holds, whole as some trainers store it, and what people add.
LIBRARY: dict[str, Any] = {
    **dict.fromkeys(("output_hidden_states", "output_attentions", "torchscript", "use_bfloat16"), False),
    **dict.fromkeys(("tf_legacy_loss", "is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"), False),
    **dict.fromkeys(("do_sample", "early_stopping", "output_scores", "return_dict_in_generate"), False),
    **dict.fromkeys(("cross_attention_hidden_size", "forced_bos_token_id", "forced_eos_token_id", "prefix"), None),
    **dict.fromkeys(("diversity_penalty", "chunk_size_feed_forward", "min_length", "no_repeat_ngram_size"), 0),
    **dict.fromkeys(("temperature", "top_p", "typical_p", "repetition_penalty", "length_penalty"), 1.0),
    **{"return_dict": True, "is_decoder": True, "pruned_heads": {}, "torch_dtype": "bfloat16", "dtype": "bfloat16"},
    **{"max_length": 20, "num_beams": 1, "num_beam_groups": 1, "top_k": 50, "num_return_sequences": 1},
    **{"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0}, "bad_words_ids": [[3]]},
    **{
        "architectures": ["X"],
        "_name_or_path": "x/y",
        "transformers_version": "4.47.0",
        "auto_map": {"AutoModel": "x"},
    },
    **{"_attn_implementation_autoset": True, "eos_token_id": [1, 2], "bos_token_id": 0, "pad_token_id": None},
    **{"max_new_tokens": 9, "use_cache": False, "max_seq_len": 2048, "seq_length": 2048, "model_max_length": 2048},
    **{"attention_dropout": 0.1, "trust_remote_code": True, "license": "mit", "gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", [name for name in EXAMPLES if spec_of(name).name in ("fla", "syncdoth", "xatl")])
def test_what_a_library_writes_for_itself_is_no_reason_to_refuse(name: str, tmp_path: Path) -> None:
    config_file = example(name, tmp_path / "checkpoint")
    document, base = json.loads(config_file.read_text()), model(open_checkpoint(config_file.parent))
    config_file.write_text(json.dumps({**LIBRARY, **document}))
    assert model(open_checkpoint(config_file.parent)) == base


@pytest.mark.parametrize("place", ["cfg.model", "args"])
def test_the_whole_namespace_of_fairseq_is_read(place: str, tmp_path: Path) -> None:
    """Releases without dataclasses store every option of the command line and what the architecture adds to them."""
    tree = torch.load(CONFORMANCE / "ts_base_gelu/checkpoint_fairseq.pt", weights_only=False)
    options = {
        **{"arch": "retnet_base", "task": "language_modeling", "criterion": "cross_entropy", "optimizer": "adam"},
        **{"max_sentences": 8, "max_sentences_valid": 8, "distributed_wrapper": "DDP", "raw_text": False, "seed": 1},
        **{"adaptive_input": False, "adaptive_input_factor": 4, "adaptive_input_cutoff": None, "base_sublayers": 1},
        **{"adaptive_softmax_dropout": 0, "adaptive_softmax_factor": 4, "base_layers": 0, "base_shuffle": False},
        **{"decoder_layerdrop": 0, "decoder_layers_to_keep": None, "no_decoder_final_norm": False, "pad": 1, "eos": 2},
        **{"no_token_positional_embeddings": False, "tie_adaptive_weights": False, "unk": 3, "bos": 0},
        **{"character_embeddings": False, "max_source_positions": 1024, "tokens_per_sample": 512, "lr": [0.1]},
    }
    namespace = Namespace(**{**options, **tree["cfg"]["model"]})
    tree["cfg"], tree["args"] = ({"model": namespace}, None) if place == "cfg.model" else (None, namespace)
    torch.save(tree, tmp_path / "checkpoint.pt")
    expected = open_checkpoint(CONFORMANCE / "ts_base_gelu/checkpoint_fairseq.pt")
    found = open_checkpoint(tmp_path / "checkpoint.pt")
    assert model(found) == model(expected)


def test_keys_of_a_record_inside_the_file_are_held_to_the_same_rule(tmp_path: Path) -> None:
    tree = torch.load(CONFORMANCE / "ts_base_gelu/checkpoint_fairseq.pt", weights_only=False)
    base = model(open_checkpoint(CONFORMANCE / "ts_base_gelu/checkpoint_fairseq.pt"))
    settings = dict(tree["cfg"]["model"])
    for key, value, match in (
        ("layernorm_eps", 1e-3, None),
        ("moe_freq", 2, "moe_freq"),
        ("window_attention", True, "window_attention"),
        ("decoder_normalize_before", False, "decoder_normalize_before"),
    ):
        tree["cfg"]["model"] = {**settings, key: value}
        torch.save(tree, tmp_path / "checkpoint.pt")
        if match is None:
            assert model(open_checkpoint(tmp_path / "checkpoint.pt")) != base
        else:
            with pytest.raises(InputError, match=match):
                open_checkpoint(tmp_path / "checkpoint.pt")


def test_a_size_that_the_configuration_leaves_out_is_said(tmp_path: Path) -> None:
    config_file = example("syncdoth", tmp_path / "checkpoint")
    document = json.loads(config_file.read_text())
    assert document.pop("decoder_retention_heads") == 3
    config_file.write_text(json.dumps(document))
    notes = open_checkpoint(config_file.parent).notes
    assert "decoder_retention_heads is not in the configuration: 3 assumed" in notes
