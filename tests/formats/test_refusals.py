"""Every way a checkpoint can be wrong: one line, exit code 5, and nothing in it is run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from retnet_tools.errors import InputError, UsageError
from retnet_tools.formats import open_checkpoint
from tests.formats.cases import refusal, small_tensors, write_torchscale


def test_missing_path(tmp_path: Path) -> None:
    refusal(tmp_path / "nowhere", "no such file or folder")


def test_unknown_folder_says_where_the_layouts_are(tmp_path: Path) -> None:
    save_file({"some.weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    refusal(tmp_path, r"no RetNet of a known layout.*docs/formats\.md")


def test_unknown_format_name_suggests_a_near_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'torchscale'"):
        open_checkpoint(tmp_path, "torchscal")


def test_folder_with_several_files_of_weights(tmp_path: Path) -> None:
    write_torchscale(tmp_path, name="checkpoint_best.pt")
    last = write_torchscale(tmp_path, name="checkpoint_last.pt")
    refusal(tmp_path, r"checkpoint_best\.pt, checkpoint_last\.pt")
    assert open_checkpoint(last).config.num_layers == 2


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize("kept", [0, 3, 30, 0.5, -1])
def test_truncated_file_names_itself(tmp_path: Path, name: str, kept: float) -> None:
    file = write_torchscale(tmp_path, name=name)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    refusal(tmp_path, name)


def test_truncated_safetensors_says_found_and_expected_sizes(tmp_path: Path) -> None:
    file = write_torchscale(tmp_path, name="model.safetensors")
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-10])
    refusal(tmp_path, rf"has {size - 10} bytes; expected {size}")


def test_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    file = write_torchscale(tmp_path, name="model.safetensors")
    weights = open_checkpoint(tmp_path).weights
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(InputError, match="inside a tensor"):
        weights.read("lm_head.weight")


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F8_E4M3"},
        {"dtype": ["F32"]},
        {"shape": [8, -8]},
        {"shape": [1 << 62, 1 << 62]},
        {"data_offsets": [0, 1 << 40]},
        {"data_offsets": [4, 260]},
        {"shape": None},
    ],
    ids=str,
)
def test_broken_safetensors_header(tmp_path: Path, change: dict[str, Any]) -> None:
    file = write_torchscale(tmp_path, name="model.safetensors")
    rewrite_header(file, lambda header: header["layers.0.retention.q_proj.weight"].update(change))
    refusal(tmp_path, "model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_wrong_unknown_missing_and_integer_tensors(tmp_path: Path, name: str) -> None:
    tensors = small_tensors("decoder.")
    key = "decoder.layers.1.ffn.fc2.weight"
    write_torchscale(tmp_path, {**tensors, key: tensors[key].T.copy()}, name=name)
    refusal(tmp_path, rf"{key}' has shape \[10, 8\]; expected \[8, 10\] for 'layers\.1\.ffn\.down_proj\.weight'")
    write_torchscale(tmp_path, {**tensors, "decoder.adapter.weight": tensors[key]}, name=name)
    refusal(tmp_path, r"unknown tensor 'decoder\.adapter\.weight'")
    write_torchscale(tmp_path, {**tensors, "decoder.layers.2.ffn.fc2.weight": tensors[key]}, name=name)
    refusal(tmp_path, r"unknown tensor 'decoder\.layers\.2\.ffn\.fc2\.weight'")
    write_torchscale(tmp_path, {**tensors, key: tensors[key].astype(np.int64)}, name=name)
    refusal(tmp_path, rf"{key}' is int64")
    write_torchscale(tmp_path, {k: v for k, v in tensors.items() if k != key}, name=name)
    refusal(tmp_path, rf"no tensor '{key}'; expected it, for 'layers\.1\.ffn\.down_proj\.weight'")


def write_shards(folder: Path) -> dict[str, str]:
    write_torchscale(folder)
    (folder / "model.pt").unlink()
    tensors = small_tensors()
    weight_map = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_and_broken_indices(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    read = open_checkpoint(tmp_path).weights.read("embedding.weight")
    np.testing.assert_array_equal(read, small_tensors()["embed_tokens.weight"])
    first = next(iter(weight_map))
    for shard in ("../model-00001-of-00002.safetensors", "/etc/passwd", "..", "", "a\\b"):
        write_index(tmp_path, {**weight_map, first: shard})
        refusal(tmp_path, "a file name inside the folder")
    write_index(tmp_path, {**weight_map, first: "model-00003-of-00002.safetensors"})
    refusal(tmp_path, "no shard 'model-00003-of-00002.safetensors'")
    write_index(tmp_path, {**weight_map, "ghost.weight": weight_map[first]})
    refusal(tmp_path, "has no tensor 'ghost.weight'")
    write_index(tmp_path, {name: shard for name, shard in weight_map.items() if name != first})
    refusal(tmp_path, f"holds '{first}'")
    for broken in (None, [], {"a": 1}):
        write_index(tmp_path, broken)
        refusal(tmp_path, "no weight_map")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    refusal(tmp_path, "cannot be read as JSON")


def test_configuration_that_is_not_json(tmp_path: Path) -> None:
    write_torchscale(tmp_path)
    (tmp_path / "args.json").write_bytes(b"\xff\xfe{")
    refusal(tmp_path, r"args\.json cannot be read as JSON")


def test_explicit_format_says_what_it_misses(tmp_path: Path) -> None:
    file = write_torchscale(tmp_path)
    (tmp_path / "args.json").unlink()
    with pytest.raises(InputError, match="no torchscale configuration"):
        open_checkpoint(file, "torchscale")
    with pytest.raises(InputError, match="no retnet-tools configuration"):
        open_checkpoint(file, "canonical")


@cache
def whole_file(name: str) -> bytes:
    """Written once: the legacy container names storages by their addresses, so that no two are of one length."""
    with TemporaryDirectory() as folder:
        file = write_torchscale(Path(folder), name="model.pt" if name == "legacy" else name)
        if name == "legacy":
            tree = {key: torch.from_numpy(value) for key, value in small_tensors().items()}
            torch.save(tree, file, _use_new_zipfile_serialization=False)
        return file.read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "legacy"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_are_refused_or_read_but_never_crash(tmp_path: Path, name: str, data: st.DataObject) -> None:
    file = write_torchscale(tmp_path, name="model.pt" if name == "legacy" else name)
    content = bytearray(whole_file(name))
    heads = st.integers(0, 4000) | st.integers(len(content) - 4000, len(content) - 1)
    for place in data.draw(st.lists(heads, min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with contextlib.suppress(InputError):
        weights = open_checkpoint(file).weights
        for tensor in weights.names():
            weights.read(tensor)
