"""Every way a checkpoint can be wrong: one line, exit code 5, and nothing in it is run."""

from __future__ import annotations

import contextlib
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from retnet_tools.errors import InputError, UsageError
from retnet_tools.formats import open_checkpoint
from retnet_tools.formats.files import CheckpointFiles
from tests.formats.cases import small_tensors, write_torchscale


def refusal(path: Path, match: str) -> InputError:
    with pytest.raises(InputError, match=match) as caught:
        open_checkpoint(path)
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)
    return caught.value


def test_missing_path(tmp_path: Path) -> None:
    refusal(tmp_path / "nowhere", "no such file or folder")


def test_unknown_folder_lists_what_was_looked_for(tmp_path: Path) -> None:
    error = refusal(tmp_path, "no checkpoint of a known format")
    assert "canonical" in str(error)
    assert "decoder_embed_dim" in str(error)


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


class Payload:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.sentinel, "ran")


class Call:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("container", ["zip", "legacy", "plain", "protocol 0"])
def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, container: str) -> None:
    file = write_torchscale(tmp_path)
    sentinel = tmp_path / "sentinel"
    tree = {"model": {"embed_tokens.weight": torch.zeros(2)}, "extra_state": Payload(sentinel)}
    if container in ("zip", "legacy"):
        torch.save(tree, file, _use_new_zipfile_serialization=container == "zip")
    else:
        file.write_bytes(pickle.dumps(Payload(sentinel), protocol=0 if container == "protocol 0" else 4))
    refusal(tmp_path, r"refused pickle global '.*' in .*model\.pt")
    assert not sentinel.exists()


@pytest.mark.parametrize("function", [eval, getattr, print, torch.load, np.fromfile], ids=lambda f: f.__name__)
def test_refused_global_is_named(tmp_path: Path, function: Any) -> None:
    file = write_torchscale(tmp_path)
    torch.save({"x": Call(function, "0")}, file)
    refusal(tmp_path, rf"refused pickle global '[\w.]*{function.__name__}'")


def test_pickle_cannot_alter_what_it_names(tmp_path: Path) -> None:
    """BUILD sets attributes on whatever is on the stack: here on each stand-in, then on a tensor."""
    file = write_torchscale(tmp_path)
    names = (b"torch._utils\n_rebuild_tensor_v2", b"argparse\nNamespace", b"numpy\ndtype", b"torch\nFloatStorage")
    for name in names:
        state = b"\x80\x02c" + name + b"\n}X\x08\x00\x00\x00__init__Ns\x86b."
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("model/data.pkl", state)
        refusal(tmp_path, "model.pt")
    write_torchscale(tmp_path)
    assert open_checkpoint(tmp_path).config.num_layers == 2


def rezip(file: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in entries.items():
            if (changed := change(name, data)) is not None:
                archive.writestr(name, changed)


def test_broken_torch_zips(tmp_path: Path) -> None:
    file = write_torchscale(tmp_path)
    rezip(file, lambda name, data: b"big" if name.endswith("byteorder") else data)
    refusal(tmp_path, "byte order b'big'")
    write_torchscale(tmp_path)
    rezip(file, lambda name, data: None if name.endswith("data/3") else data)
    refusal(tmp_path, "no entry model/data/3")
    write_torchscale(tmp_path)
    rezip(file, lambda name, data: data[:-4] if name.endswith("data/3") else data)
    refusal(tmp_path, "storage 3 has 28 bytes|storage 3 has")
    write_torchscale(tmp_path)
    rezip(file, lambda name, data: data[:40] if name.endswith("data.pkl") else data)
    refusal(tmp_path, "corrupt")
    write_torchscale(tmp_path)
    rezip(file, lambda name, data: data, zipfile.ZIP_DEFLATED)
    refusal(tmp_path, "compressed")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    refusal(tmp_path, "no data.pkl")


@pytest.mark.parametrize("tree", [[1, 2], {"a": 1}, {}, torch.zeros(2), {"model": {"a": "text"}}], ids=str)
def test_torch_file_without_a_state_dict(tmp_path: Path, tree: object) -> None:
    file = write_torchscale(tmp_path)
    torch.save(tree, file)
    refusal(tmp_path, "model.pt")


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
    with pytest.raises(InputError, match=r"no config\.json of retnet-tools"):
        open_checkpoint(file, "canonical")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_views_of_shared_storage_are_read_as_torch_reads_them(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(60, dtype=torch.float64).view(3, 4, 5)
    tree = {
        "whole": base,
        "transposed": base.transpose(0, 2),
        "slice": base[1:, ::2, 1:4],
        "expanded": base[0, 0].expand(3, 5),
        "half": base.to(torch.bfloat16),
        "parameter": torch.nn.Parameter(base.to(torch.float16)),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "count": torch.tensor([1, 2]),
    }
    torch.save(tree, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    tensors = CheckpointFiles(tmp_path / "model.pt").tensors
    for name, expected in tree.items():
        array = tensors.read(name)
        assert array.flags.c_contiguous
        assert array.shape == tuple(expected.shape)
        assert array.dtype.name == str(expected.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(array.astype(np.float64), expected.detach().to(torch.float64).numpy())


def test_a_pickle_cannot_reserve_memory(tmp_path: Path) -> None:
    """LONG_BINPUT with index 2^31 makes an unguarded unpickler reserve 16 GB or more."""
    file = write_torchscale(tmp_path)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02}r\x00\x00\x00\x80.")
    refusal(tmp_path, "memo index 2147483648")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "legacy"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_are_refused_or_read_but_never_crash(tmp_path: Path, name: str, data: st.DataObject) -> None:
    file = write_torchscale(tmp_path, name="model.safetensors" if name == "model.safetensors" else "model.pt")
    if name == "legacy":
        torch.save(
            {k: torch.from_numpy(v) for k, v in small_tensors().items()}, file, _use_new_zipfile_serialization=False
        )
    content = bytearray(file.read_bytes())
    heads = st.integers(0, 4000) | st.integers(len(content) - 4000, len(content) - 1)
    for place in data.draw(st.lists(heads, min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with contextlib.suppress(InputError):
        weights = open_checkpoint(file).weights
        for tensor in weights.names():
            weights.read(tensor)
