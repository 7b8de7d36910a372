"""What it takes to add a format: one file like the first part of this one, and its row in `FORMATS`.

The toy is a stack of gated RetNet blocks whose projections to q, k and v are one matrix, with sizes in a `toy.json`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import retnet_tools.formats as formats
from retnet_tools.config import BlockNorm, FeedForward, HeadNorm, RetNetConfig, ScoreNormalization
from retnet_tools.errors import InputError
from retnet_tools.formats import open_checkpoint
from retnet_tools.formats.mapping import row_range
from retnet_tools.formats.settings import TRAINING, Keys, Settings, words
from retnet_tools.formats.spec import FormatSpec, Reading, Source, in_layers, module_names
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.jobs.convert import ConvertRequest, convert
from retnet_tools.jobs.verify import VerifyRequest, verify
from retnet_tools.paper import paper_decay, paper_rotary_frequencies
from retnet_tools.weights import Array
from tests.helpers import MemorySource, random_source, random_tokens
from tests.reference import reference_logits

QKV = tuple(f"retention.{name}_proj" for name in "qkv")
LAYER = {
    "norm": "retention_norm",
    "mix": QKV,
    "gate": "retention.gate_proj",
    "out": "retention.out_proj",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn.gate_proj",
    "mlp.up": "ffn.up_proj",
    "mlp.down": "ffn.down_proj",
}
NAMES = module_names({"tokens": "embedding", **in_layers("blocks", LAYER), "norm": "final_norm", "logits": "lm_head"})


def read(source: Source) -> Reading:
    settings = source.settings
    width, heads = settings.count("width"), settings.count("heads")
    if width % heads:
        raise settings.wrong("heads", heads, f"a divisor of width = {width}")
    config = RetNetConfig(
        vocab_size=settings.count("vocab_size"),
        hidden_size=width,
        num_layers=settings.count("depth"),
        num_heads=heads,
        key_dim=width,
        value_dim=width,
        decay=paper_decay(heads),
        rotary_frequencies=paper_rotary_frequencies(width // heads),
        score_normalization=ScoreNormalization((width // heads) ** -0.5, by_decay=False, clamp="none"),
        head_norm=HeadNorm("rms", 1e-6),
        block_norm=BlockNorm("rms", settings.number("eps", 1e-6)),
        feed_forward=FeedForward("glu", settings.count("mlp_width"), "silu"),
        tie_word_embeddings=settings.flag("tied", False),
    )
    transforms = {
        f"layers.{{i}}.{name}.weight": row_range(i * width, width, len(QKV) * width) for i, name in enumerate(QKV)
    }
    return Reading(config, "toy 1", NAMES, transforms=transforms)


TOY = FormatSpec(
    name="toy",
    layout="the toy",
    keys=Keys(read=words("depth eps heads mlp_width tied vocab_size width"), inert=TRAINING),
    is_settings=lambda document: {"depth", "width", "heads"} <= document.keys(),
    settings_words="depth, width and heads",
    marks=("blocks.0.mix.weight", "tokens.weight"),
    names=NAMES,
    read=read,
)

SETTINGS = {"depth": 2, "width": 16, "heads": 2, "mlp_width": 24, "vocab_size": 31, "eps": 1e-5, "lr": 3e-4}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, TOY))


def expected_config() -> RetNetConfig:
    return read(Source(StoredTensors({}), Settings("toy", SETTINGS))).config


def toy_tensors(source: MemorySource) -> dict[str, Array]:
    """What the toy's own code would save."""
    canonical = source.tensors
    stored = {
        "tokens.weight": "embedding.weight",
        "norm.weight": "final_norm.weight",
        "logits.weight": "lm_head.weight",
    }
    tensors = {name: canonical[to] for name, to in stored.items() if to in canonical}
    for i in range(SETTINGS["depth"]):
        for name, to in LAYER.items():
            parts = [to] if isinstance(to, str) else to
            arrays = [canonical[f"layers.{i}.{part}.weight"] for part in parts]
            tensors[f"blocks.{i}.{name}.weight"] = np.concatenate(arrays)
    return tensors


def save(folder: Path, tensors: dict[str, Array], settings: dict[str, object], prefix: str = "") -> Path:
    folder.mkdir()
    save_file({prefix + name: array for name, array in tensors.items()}, folder / "model.safetensors")
    (folder / "toy.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def source() -> MemorySource:
    return random_source(expected_config(), seed=0)


@pytest.mark.parametrize("prefix", ["", "module.", "model.net."])
def test_a_toy_checkpoint_is_found_and_every_tensor_is_in_its_place(
    prefix: str, source: MemorySource, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "toy", toy_tensors(source), SETTINGS, prefix))
    assert (checkpoint.format, checkpoint.config, checkpoint.notes) == ("toy 1", expected_config(), [])
    for name, array in source.tensors.items():
        np.testing.assert_array_equal(checkpoint.weights.read(name), array, err_msg=name)
    ids = random_tokens(checkpoint.config, 1, 7, seed=1)
    logits = reference_logits(checkpoint.config, checkpoint.weights, ids)
    np.testing.assert_array_equal(logits, reference_logits(expected_config(), source, ids))


def test_the_forms_agree_on_it(source: MemorySource, tmp_path: Path) -> None:
    folder = save(tmp_path / "toy", toy_tensors(source), SETTINGS)
    result = verify(VerifyRequest(folder, tokens=24, chunk_size=7))
    result.require()
    assert result.passed


def test_it_becomes_a_checkpoint_of_another_format(source: MemorySource, tmp_path: Path) -> None:
    folder = save(tmp_path / "toy", toy_tensors(source), SETTINGS)
    convert(ConvertRequest(folder, tmp_path / "canonical", format="toy"))
    back = open_checkpoint(tmp_path / "canonical")
    assert back.config == expected_config()
    for name, array in source.tensors.items():
        np.testing.assert_array_equal(back.weights.read(name), array, err_msg=name)


def test_a_tied_head_needs_no_word_in_the_format(source: MemorySource, tmp_path: Path) -> None:
    tensors, tied = toy_tensors(source), {**SETTINGS, "tied": True}
    same = save(tmp_path / "same", {**tensors, "logits.weight": tensors["tokens.weight"].copy()}, tied)
    assert open_checkpoint(same).config == dataclasses.replace(expected_config(), tie_word_embeddings=True)
    with pytest.raises(InputError, match=r"ties the embeddings but 'logits\.weight' differs from 'tokens\.weight'"):
        open_checkpoint(save(tmp_path / "other", tensors, tied))


@pytest.mark.parametrize(
    ("tensors", "settings", "match"),
    [
        ({"blocks.1.mix.weight": None}, {}, r"no tensor 'blocks\.1\.mix\.weight'"),
        ({"blocks.0.extra.weight": np.ones((2, 2), np.float32)}, {}, r"unknown tensor 'blocks\.0\.extra\.weight'"),
        ({"blocks.0.mix.weight": np.ones((32, 16), np.float32)}, {}, r"has shape \[32, 16\]; expected \[48, 16\]"),
        ({}, {"window": 3}, r"the toy configuration has window = 3; .*--ignore-key window"),
        ({}, {"heads": 3}, r"heads = 3; expected a divisor of width = 16"),
        ({}, {"mlp_width": None}, "has no mlp_width"),
    ],
    ids=["missing", "unknown", "shape", "key", "value", "size"],
)
def test_what_is_wrong_with_it_is_said_by_name(
    tensors: dict[str, Array | None], settings: dict[str, object], match: str, source: MemorySource, tmp_path: Path
) -> None:
    found = {name: array for name, array in {**toy_tensors(source), **tensors}.items() if array is not None}
    with pytest.raises(InputError, match=match):
        open_checkpoint(save(tmp_path / "toy", found, {**SETTINGS, **settings}))
