"""safetensors files: names that `save_model` leaves to the metadata; bytes and their places."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file, save_model

from retnet_tools.errors import InputError, UsageError
from retnet_tools.formats.files import CheckpointFiles
from retnet_tools.formats.safetensors_files import open_safetensors, write_safetensors
from retnet_tools.formats.storage import PlannedTensor


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 3)
        self.norm = torch.nn.LayerNorm(3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.output = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.output.weight = self.embedding.weight


def test_all_names_of_a_tied_tensor_are_read(tmp_path: Path) -> None:
    model = Tied()
    save_model(model, str(tmp_path / "model.safetensors"))
    tensors = CheckpointFiles(tmp_path).tensors
    expected = model.state_dict()
    assert set(tensors.names()) == set(expected)
    assert len(tensors.aliases) == 2
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensors.read(name), tensor.numpy())
    assert tensors.same_data("head.weight", "embedding.weight")
    assert tensors.region("head.weight") == tensors.region("embedding.weight")


def test_metadata_that_names_no_tensor_is_no_alias(tmp_path: Path) -> None:
    metadata = {"format": "pt", "a": "b", "b": "a", "c": "missing", "d": "c"}
    save_file({"a": torch.ones(2), "b": torch.zeros(2)}, tmp_path / "model.safetensors", metadata=metadata)
    tensors = CheckpointFiles(tmp_path).tensors
    assert set(tensors.names()) == {"a", "b"}
    assert tensors.aliases == {}
    assert tensors.read("a").tolist() == [1, 1]
    assert tensors.metadata == metadata


@pytest.mark.parametrize("listed", [True, False])
def test_aliases_in_shards(tmp_path: Path, listed: bool) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({"embedding": torch.ones(2)}, tmp_path / names[0], metadata={"head": "embedding", "norm": "embedding"})
    save_file({"norm": torch.zeros(3)}, tmp_path / names[1], metadata={"format": "pt", "last": "norm"})
    weight_map = {"embedding": names[0], "norm": names[1]} | ({"head": names[0]} if listed else {})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tensors = CheckpointFiles(tmp_path).tensors
    assert set(tensors.names()) == {"embedding", "norm", "head", "last"}
    assert tensors.read("head").tolist() == [1, 1]
    assert tensors.read("norm").tolist() == tensors.read("last").tolist() == [0, 0, 0]
    assert {file.name for file in CheckpointFiles(tmp_path).weight_files} == {"model.safetensors.index.json", *names}


def test_an_index_of_torch_shards_without_the_usual_name(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, 2)}, tmp_path / "part_0")
    torch.save({"model": {"b": torch.zeros(2, 2)}}, tmp_path / "part_1")
    (tmp_path / "index").write_text(json.dumps({"weight_map": {"a": "part_0", "b": "part_1"}}))
    assert list(CheckpointFiles(tmp_path / "index").tensors.names()) == ["a", "b"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_dtypes_that_are_no_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"layers.0.w": torch.ones(2, 2).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"fp8-quantized|is C64") as caught:
        CheckpointFiles(tmp_path).tensors  # noqa: B018
    assert "layers.0.w" in str(caught.value)


def test_equal_bits_of_two_types_are_not_the_same_data(tmp_path: Path) -> None:
    bits = torch.arange(6, dtype=torch.int16).reshape(2, 3) + 0x3C00
    kinds = {"a": torch.float16, "b": torch.bfloat16, "same": torch.float16}
    state = {name: bits.clone().view(dtype) for name, dtype in kinds.items()} | {"wide": torch.zeros(2, 3)}
    save_file(state, tmp_path / "model.safetensors")
    tensors = CheckpointFiles(tmp_path).tensors
    assert [tensors.same_data("a", name) for name in ("same", "b", "wide")] == [True, False, False]


def test_an_entry_of_a_safetensors_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="entry 'ema' of model"):
        CheckpointFiles(tmp_path, entry="ema").tensors  # noqa: B018
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    with pytest.raises(UsageError, match=r"entry 'ema' of model\.safetensors\.index\.json"):
        CheckpointFiles(tmp_path, entry="ema").tensors  # noqa: B018


def stored(path: Path, entries: dict[str, tuple[int, int]], size: int) -> Path:
    """A file of uint8 tensors at these places among `size` bytes of data."""
    header = {name: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for name, (a, b) in entries.items()}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(size)))
    return path


@pytest.mark.parametrize(
    ("entries", "size", "message"),
    [
        ({"a": (0, 4), "b": (4, 8)}, 9, "as its header says"),
        ({"a": (0, 4), "b": (4, 8)}, 7, "as its header says"),
        ({"a": (0, 4), "b": (3, 8)}, 8, "starts at byte"),
        ({"a": (0, 8), "b": (2, 6)}, 8, "starts at byte"),
        ({"a": (0, 4), "b": (5, 8)}, 8, "starts at byte"),
        ({"a": (1, 4), "b": (4, 8)}, 8, "starts at byte"),
    ],
)
def test_tensors_fill_their_file_each_byte_once(
    entries: dict[str, tuple[int, int]], size: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        open_safetensors(stored(tmp_path / "x.safetensors", entries, size))


@pytest.mark.parametrize("length", range(8))
def test_tensors_begin_at_a_multiple_of_eight_bytes(length: int, tmp_path: Path) -> None:
    planned = PlannedTensor((2,), np.dtype("<f8"), "x" * (length + 1), lambda: iter((np.ones(2),)))
    write_safetensors(tmp_path / "y.safetensors", [planned])
    assert int.from_bytes((tmp_path / "y.safetensors").read_bytes()[:8], "little") % 8 == 0


def test_what_the_system_copies_a_little_at_a_time_is_copied_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda a, b, count, **places: copy(a, b, min(count, 7), **places))
    source = open_safetensors(stored(tmp_path / "x.safetensors", {"a": (0, 30), "b": (30, 50)}, 50))
    planned = [
        PlannedTensor(at.shape, at.dtype, name, lambda: iter(()), copied=source.region(name))
        for name, at in source.locations.items()
    ]
    write_safetensors(tmp_path / "y.safetensors", planned)
    with safe_open(tmp_path / "y.safetensors", "numpy") as file:
        assert file.get_tensor("a").tolist() == list(range(30))
        assert file.get_tensor("b").tolist() == list(range(30, 50))
