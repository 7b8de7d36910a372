"""Files of torch.save: nothing in them is run, and what they hold is read as torch reads it."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retnet_tools.errors import InputError
from retnet_tools.formats import open_checkpoint
from retnet_tools.formats.files import CheckpointFiles
from retnet_tools.formats.storage import planned
from retnet_tools.formats.torch_files import LEGACY_MAGIC, LEGACY_PROTOCOL, read_torch, write_torch
from tests.formats.cases import refusal, small_tensors, write_torchscale


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


class DictWithState:
    """Pickles to an OrderedDict whose attributes a state sets."""

    def __init__(self, entries: dict[str, Any], state: dict[str, Any]) -> None:
        self.entries, self.state = entries, state

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), self.state, None, iter(self.entries.items())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_attributes_set_on_a_dict_change_nothing(tmp_path: Path, zipped: bool) -> None:
    """torch's own state dicts carry `_metadata`; others could take the place of methods."""
    file = write_torchscale(tmp_path)
    tensors = {name: torch.from_numpy(array) for name, array in small_tensors().items()}
    for attribute in ("get", "items", "keys", "__class__", "__setstate__", "_metadata"):
        state = {attribute: "x"}
        for tree in (DictWithState(tensors, state), DictWithState({"model": DictWithState(tensors, state)}, state)):
            torch.save(tree, file, _use_new_zipfile_serialization=zipped)
            assert open_checkpoint(tmp_path).config.num_layers == 2


def test_a_pickle_cannot_alter_the_class_of_its_dicts(tmp_path: Path) -> None:
    file = write_torchscale(tmp_path)
    for state in (b"}X\x03\x00\x00\x00getK\x01s", b"N}X\x03\x00\x00\x00getK\x01s\x86"):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("model/data.pkl", b"\x80\x02ccollections\nOrderedDict\n" + state + b"b.")
        refusal(tmp_path, "model.pt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path, zipped: bool) -> None:
    """Strides of zero let a file of a few hundred bytes name a tensor of 64 GB."""
    file = write_torchscale(tmp_path)
    tensors = {name: torch.from_numpy(array) for name, array in small_tensors().items()}
    tensors["embed_tokens.weight"] = torch.zeros(1).expand(1 << 31, 8)
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    error = refusal(tmp_path, r"a tensor of shape \[2147483648, 8\] in a storage of 1 elements")
    assert "model.pt" in str(error)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_tensor_that_ends_behind_its_storage_is_refused(tmp_path: Path, zipped: bool) -> None:
    torch.save({"a": torch.arange(6.0), "b": torch.ones(6)}, tmp_path / "x", _use_new_zipfile_serialization=zipped)
    content = read_torch(tmp_path / "x")
    view = content.tree["a"]
    for offset, shape, stride, last in ((4, 2, 1, 5.0), (1, 3, 2, 5.0), (5, 1, 1, 5.0)):
        located = content.locate("a", view._replace(offset=offset, shape=(shape,), strides=(stride,)))
        assert located.read()[-1] == last
        with pytest.raises(InputError, match="in a storage of 6"):
            content.locate("a", view._replace(offset=offset + 1, shape=(shape,), strides=(stride,)))


class SomeStorage:
    def __init__(self, count: int, view: tuple[str, int, int] | None = None) -> None:
        self.id = ("storage", torch.FloatStorage, "0", "cpu", count, view)


class SomeTensor:
    def __init__(self, storage: SomeStorage, count: int) -> None:
        self.arguments = (storage, 0, (count,), (1,), False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.arguments


class StoragePickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return obj.id if isinstance(obj, SomeStorage) else None


def test_a_legacy_storage_of_two_sizes_is_refused(tmp_path: Path) -> None:
    def write(*counts: int, key: str = "0") -> Path:
        with (tmp_path / "x").open("wb") as file:
            for part in (LEGACY_MAGIC, LEGACY_PROTOCOL, {"little_endian": True}):
                pickle.dump(part, file, protocol=2)
            StoragePickler(file, protocol=2).dump([SomeStorage(count) for count in counts])
            pickle.dump([key], file, protocol=2)
            file.write((4).to_bytes(8, "little") + bytes(16))
        return tmp_path / "x"

    assert [storage.numel for storage in read_torch(write(4, 4)).tree] == [4, 4]
    with pytest.raises(InputError, match="storage 0 of two sizes"):
        read_torch(write(4, 8))
    with pytest.raises(InputError, match="its storages do not match its tensors"):
        read_torch(write(4, key="1"))


def test_a_legacy_storage_that_is_part_of_another_begins_where_it_says(tmp_path: Path) -> None:
    """Storages of torch before 0.4: (key, first element, elements) of a view."""

    def write(view: tuple[str, int, int], count: int) -> Path:
        with (tmp_path / "x").open("wb") as file:
            for part in (LEGACY_MAGIC, LEGACY_PROTOCOL, {"little_endian": True}):
                pickle.dump(part, file, protocol=2)
            StoragePickler(file, protocol=2).dump({"a": SomeTensor(SomeStorage(6, view), count)})
            pickle.dump(["0"], file, protocol=2)
            file.write((6).to_bytes(8, "little") + np.arange(6, dtype=np.float32).tobytes())
        return tmp_path / "x"

    content = read_torch(write(("v", 2, 3), 3))
    assert content.locate("a", content.tree["a"]).read().tolist() == [2, 3, 4]
    with pytest.raises(InputError, match="in a storage of 3"):
        (content := read_torch(write(("v", 2, 3), 4))).locate("a", content.tree["a"])
    with pytest.raises(InputError, match="no part of its own"):
        read_torch(write(("v", 4, 3), 3))


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


def test_legacy_storage_keys_that_are_no_strings(tmp_path: Path) -> None:
    file = write_torchscale(tmp_path)
    header = (LEGACY_MAGIC, LEGACY_PROTOCOL, {"little_endian": True}, {}, [[]])
    file.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in header))
    refusal(tmp_path, "its storages do not match its tensors")


def test_a_pickle_cannot_reserve_memory(tmp_path: Path) -> None:
    """LONG_BINPUT with index 2^31 makes an unguarded unpickler reserve 16 GB or more."""
    file = write_torchscale(tmp_path)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02}r\x00\x00\x00\x80.")
    refusal(tmp_path, "memo index 2147483648")


@pytest.mark.parametrize("count", [0, 1, 2, 300, 1001])
def test_a_state_dict_is_written_in_the_operations_of_torch_save(tmp_path: Path, count: int) -> None:
    shapes = ((), (3,), (2, 300), (1, 2, 3), (2, 1, 2, 1), (70_000,))
    arrays = {f"layers.{i}.ü": np.zeros(shapes[i % 6 if i < 6 else i % 5], np.float32) for i in range(count)}
    torch.save(OrderedDict((name, torch.from_numpy(array)) for name, array in arrays.items()), tmp_path / "torch.pt")
    write_torch(tmp_path / "ours.pt", [planned(name, array) for name, array in arrays.items()], None)
    pickles = []
    for file, root in (("torch.pt", "torch"), ("ours.pt", "archive")):
        with zipfile.ZipFile(tmp_path / file) as archive:
            pickles.append(archive.read(f"{root}/data.pkl"))
    assert pickles[0] == pickles[1]
