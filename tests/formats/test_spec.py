"""The mapping rule on a format made up here: many stored tensors to one, permuted rows, dropped names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import retnet_tools.formats as formats
from retnet_tools.errors import InputError
from retnet_tools.formats import open_checkpoint
from retnet_tools.formats.settings import Keys
from retnet_tools.formats.spec import FormatSpec, Reading, Source, Transform
from retnet_tools.weights import Array, canonical_shapes
from tests.helpers import BASE, random_source

CONFIG = replace(BASE, num_layers=2)
HEADS, KEY = CONFIG.num_heads, CONFIG.head_k_dim
QUERY = "layers.{i}.retention.q_proj.weight"
KEYS = "layers.{i}.retention.k_proj.weight"


def join_heads(parts: Sequence[Array]) -> Array:
    return np.concatenate([part.T for part in parts])


def halves_to_pairs(parts: Sequence[Array]) -> Array:
    halves = parts[0].reshape(HEADS, 2, KEY // 2, -1)  # [H*K, D] -> [H, 2, K/2, D]
    return halves.swapaxes(1, 2).reshape(parts[0].shape)


def read(_: Source) -> Reading:
    names: dict[str, str | tuple[str, ...] | None] = {name: name for name in canonical_shapes(CONFIG)}
    for i in range(CONFIG.num_layers):
        del names[QUERY.format(i=i)]
        del names[KEYS.format(i=i)]
    names |= {"layers.{i}.heads.{h}.W_Q": QUERY, "layers.{i}.k": KEYS, "layers.{i}.heads.{h}.scale": None}
    transforms = {
        QUERY: Transform(lambda shape: (shape[1], shape[0] // HEADS), join_heads),
        KEYS: Transform(lambda shape: shape, halves_to_pairs),
    }
    return Reading(CONFIG, "made up", names, transforms=transforms)


MADE_UP = FormatSpec(
    name="made-up",
    layout="a layout made up here",
    keys=Keys(read=frozenset()),
    is_settings=lambda document: False,
    settings_words="nothing",
    marks=("layers.0.heads.0.W_Q",),
    names=("layers.{i}.heads.{h}.W_Q", "layers.{i}.k"),
    read=read,
    needs_settings=False,
)


@pytest.fixture
def expected(monkeypatch: pytest.MonkeyPatch) -> dict[str, Array]:
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, MADE_UP))
    return random_source(CONFIG, seed=0).tensors


def stored_as(tensors: dict[str, Array]) -> dict[str, Array]:
    stored = dict(tensors)
    for i in range(CONFIG.num_layers):
        query, key = stored.pop(QUERY.format(i=i)), stored.pop(KEYS.format(i=i))
        for h in range(HEADS):
            stored[f"layers.{i}.heads.{h}.W_Q"] = query[h * KEY : (h + 1) * KEY].T.copy()
            stored[f"layers.{i}.heads.{h}.scale"] = np.ones(3, np.float32)
        stored[f"layers.{i}.k"] = np.concatenate(
            [
                rows
                for h in range(HEADS)
                for rows in (key[h * KEY : (h + 1) * KEY : 2], key[h * KEY + 1 : (h + 1) * KEY : 2])
            ]
        )
    return stored


def test_parts_are_joined_and_rows_permuted(tmp_path: Path, expected: dict[str, Array]) -> None:
    save_file(stored_as(expected), tmp_path / "made-up.safetensors")
    weights = open_checkpoint(tmp_path).weights
    for name, array in expected.items():
        found = weights.read(name)
        np.testing.assert_array_equal(found, array)
        assert found.flags.c_contiguous
        assert weights.info(name).shape == array.shape


def test_a_missing_head_is_named_as_stored_and_as_canonical(tmp_path: Path, expected: dict[str, Array]) -> None:
    stored = stored_as(expected)
    del stored["layers.1.heads.2.W_Q"]
    save_file(stored, tmp_path / "made-up.safetensors")
    with pytest.raises(InputError, match=r"'layers\.1\.heads\.2\.W_Q'.*'layers\.1\.retention\.q_proj\.weight'"):
        open_checkpoint(tmp_path)


def test_a_head_too_many_is_unknown(tmp_path: Path, expected: dict[str, Array]) -> None:
    save_file(
        {**stored_as(expected), "layers.0.heads.4.scale": np.ones(3, np.float32)}, tmp_path / "made-up.safetensors"
    )
    with pytest.raises(InputError, match=r"unknown tensor 'layers\.0\.heads\.4\.scale'"):
        open_checkpoint(tmp_path)


def test_two_formats_that_both_match_ask_for_a_choice(
    tmp_path: Path, expected: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(stored_as(expected), tmp_path / "made-up.safetensors")
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, replace(MADE_UP, name="second")))
    with pytest.raises(InputError, match="could be made-up or second; expected one format; choose with --from made-up"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path, "second").config == CONFIG
