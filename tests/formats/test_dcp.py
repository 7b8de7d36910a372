"""DCP folders, against torch's own loader."""

from __future__ import annotations

import contextlib
import io
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from retnet_tools.errors import InputError, UsageError
from retnet_tools.formats.dcp import fill_exactly
from retnet_tools.formats.files import CheckpointFiles
from tests.formats.cases import CONFORMANCE

FLAME = CONFORMANCE / "flame_dcp" / "seed_step-0"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def torch_reads(folder: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The model in a DCP folder, by torch's converter."""
    dcp_to_torch_save(folder, tmp_path / "converted.pt")
    tree = torch.load(tmp_path / "converted.pt", weights_only=False)
    return {f"model.{name}": tensor for name, tensor in tree["model"].items()}


def assert_holds(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    tensors = CheckpointFiles(folder).tensors
    assert set(tensors.names()) == set(expected)
    for name, tensor in expected.items():
        whole = tensors.read(name)
        assert tensors.info(name).shape == whole.shape == tuple(tensor.shape)
        assert whole.dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert whole.flags.c_contiguous
        np.testing.assert_array_equal(whole.astype(np.float64), tensor.double().numpy())
        blocks = list(tensors.blocks(name))
        np.testing.assert_array_equal(np.concatenate(blocks) if whole.ndim else blocks[0], whole)


def test_flame_folder_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    expected = torch_reads(FLAME, tmp_path)
    assert len(expected) == 25
    assert_holds(FLAME, expected)
    files = CheckpointFiles(FLAME)
    assert files.weights_file == FLAME / ".metadata"
    assert {file.name for file in files.weight_files} == {".metadata", *(f"__0_{i}.distcp" for i in range(8))}
    assert list(CheckpointFiles(FLAME / ".metadata").tensors.names()) == list(files.tensors.names())


MODEL = {
    "embed.weight": torch.arange(30.0).view(10, 3),
    "half": torch.arange(6, dtype=torch.bfloat16),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "scalar": torch.tensor(2.0),
    "empty": torch.zeros(0, 3),
    "count": torch.tensor([7]),
}


def save(folder: Path, tree: dict[str, Any], **options: Any) -> Path:
    dcp.save(tree, storage_writer=dcp.FileSystemWriter(folder, **options), no_dist=True)
    return folder


@pytest.mark.parametrize("single_file", [True, False])
def test_optimizers_and_states_are_left_out(tmp_path: Path, single_file: bool) -> None:
    tree = {
        "model": MODEL,
        "optimizer": {"state": {"embed.weight": {"exp_avg": torch.ones(10, 3)}}},
        "lr_scheduler": {"last": 3, "table": torch.ones(3, 3)},
        "train_state": {"step": torch.tensor(3), "log": io.BytesIO(b"x")},
        "dataloader": {"seen": torch.ones(2, 2)},
    }
    folder = save(tmp_path / "dcp", tree, single_file_per_rank=single_file)
    assert_holds(folder, {f"model.{name}": tensor for name, tensor in MODEL.items()})


def test_a_model_without_a_key(tmp_path: Path) -> None:
    assert_holds(save(tmp_path / "dcp", dict(MODEL)), MODEL)


def test_an_average_beside_the_model(tmp_path: Path) -> None:
    folder = save(tmp_path / "dcp", {"model": MODEL, "ema": {name: tensor + 1 for name, tensor in MODEL.items()}})
    files = CheckpointFiles(folder)
    assert set(files.tensors.names()) == {f"model.{name}" for name in MODEL}
    assert "--entry ema" in files.notes[0]
    chosen = CheckpointFiles(folder, entry="ema").tensors
    np.testing.assert_array_equal(chosen.read("ema.embed.weight"), MODEL["embed.weight"].numpy() + 1)
    with pytest.raises(UsageError, match="no entry 'emma'"):
        CheckpointFiles(folder, entry="emma").tensors  # noqa: B018


def test_blocks_of_a_tensor_larger_than_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retnet_tools.formats import storage as module

    monkeypatch.setattr(module, "BLOCK_BYTES", 30)
    tensors = CheckpointFiles(save(tmp_path / "dcp", {"model": MODEL})).tensors
    blocks = list(tensors.blocks("model.embed.weight"))
    assert [block.shape[0] for block in blocks] == [2, 2, 2, 2, 2]
    np.testing.assert_array_equal(np.concatenate(blocks), MODEL["embed.weight"].numpy())


def test_equal_tensors(tmp_path: Path) -> None:
    tree = {"a": torch.ones(4, 3), "b": torch.ones(4, 3), "c": torch.zeros(4, 3), "d": torch.ones(3, 4)}
    tree |= {"half": (bits := torch.full((4, 3), 0x3C00, dtype=torch.int16)).view(torch.float16)}
    tree |= {"brain": bits.clone().view(torch.bfloat16)}
    tensors = CheckpointFiles(save(tmp_path / "dcp", {"model": tree})).tensors
    assert [tensors.same_data("model.a", f"model.{name}") for name in "abcd"] == [True, True, False, False]
    assert not tensors.same_data("model.half", "model.brain")


@pytest.mark.slow
def test_shards_of_several_ranks(tmp_path: Path) -> None:
    folder, world = tmp_path / "dcp", 4
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("dcp_ranks.py")
    commands = [[sys.executable, str(script), str(folder), str(r), str(world), str(port)] for r in range(world)]
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for rank in ranks:
        _, errors = rank.communicate(timeout=600)
        assert rank.returncode == 0, errors
    whole = torch.load(folder / "whole.pt")
    assert len(list(folder.glob("__*.distcp"))) >= world
    assert_holds(folder, {f"model.{name}": tensor for name, tensor in whole.items()})


def change_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def read_all(folder: Path) -> None:
    tensors = CheckpointFiles(folder).tensors
    for name in tensors.names():
        tensors.read(name)


def refused(folder: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        read_all(folder)
    assert len(str(caught.value)) <= 200


def chunks(metadata: Any, name: str, *boxes: tuple[list[int], list[int]]) -> None:
    found = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
    index = next(key for key in metadata.storage_data if key.fqn == name)
    info = metadata.storage_data[index]
    metadata.state_dict_metadata[name].chunks = found
    for box in found:
        metadata.storage_data[type(index)(name, box.offsets)] = info


def test_broken_folders(tmp_path: Path) -> None:
    folder, name = tmp_path / "dcp", "model.embed.weight"

    def broken(change: Callable[[Any], None], match: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        save(folder, {"model": {"embed.weight": MODEL["embed.weight"]}})
        change_metadata(folder, change)
        refused(folder, match)

    def first(metadata: Any) -> Any:
        return next(iter(metadata.storage_data.values()))

    gaps = "overlap or leave gaps"
    broken(lambda m: chunks(m, name, ([0, 0], [9, 3])), gaps)
    broken(lambda m: chunks(m, name, ([0, 0], [10, 2]), ([0, 1], [10, 1])), gaps)
    broken(lambda m: chunks(m, name, ([0, 0], [5, 3]), ([4, 0], [5, 3])), gaps)
    broken(lambda m: chunks(m, name, ([0, 0], [11, 3])), gaps)
    broken(lambda m: chunks(m, name), gaps)
    broken(lambda m: chunks(m, name, ([0], [30])), gaps)
    broken(lambda m: chunks(m, name, ([0, 0], [5, 3]), ([5, 0], [5, 3])), r"holds float32 \[10, 3\] for a chunk")
    broken(lambda m: m.storage_data.clear(), "no data for 'model.embed.weight'")
    broken(lambda m: setattr(first(m), "transform_descriptors", ["zstd"]), "compressed .distcp")
    broken(lambda m: setattr(first(m), "relative_path", "../secret"), "the file name '../secret'")
    broken(lambda m: setattr(first(m), "relative_path", "__1_0.distcp"), r"no __1_0\.distcp in dcp")
    broken(lambda m: setattr(first(m), "offset", -1), "a broken place")
    broken(lambda m: setattr(first(m), "length", 1 << 40), "truncated")
    broken(lambda m: setattr(first(m), "length", 200), "truncated, corrupt")
    broken(lambda m: setattr(m.state_dict_metadata[name].properties, "dtype", torch.float16), "holds float32")
    broken(lambda m: setattr(m.state_dict_metadata[name].properties, "dtype", torch.float8_e4m3fn), "fp8-quantized")
    broken(lambda m: setattr(m, "state_dict_metadata", None), r"a \.metadata of torch")
    broken(lambda m: m.state_dict_metadata.clear(), "no state dict")


def test_truncated_and_hostile_files(tmp_path: Path) -> None:
    folder = save(tmp_path / "dcp", {"model": MODEL})
    part = next(folder.glob("*.distcp"))
    data = part.read_bytes()
    part.write_bytes(data[:-1])
    refused(folder, rf"is truncated: {len(data) - 1} bytes; expected .*as \.metadata says")
    part.write_bytes(bytes(len(data)))
    refused(folder, "truncated, corrupt or no torch file|a pickle")
    part.unlink()
    refused(folder, rf"no {part.name}")
    (folder / ".metadata").write_bytes(pickle.dumps(print))
    refused(folder, "refused pickle global 'builtins.print'")
    (folder / ".metadata").write_bytes(b"")
    refused(folder, "truncated, corrupt")
    part.write_bytes(data)
    with pytest.raises(InputError, match="name its folder"):
        CheckpointFiles(part)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_are_refused_or_read_but_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "dcp"
    if not folder.exists():
        save(folder, {"model": {"a": torch.ones(4, 3), "b": torch.ones(2)}})
        shutil.copytree(folder, tmp_path / "whole")
    for name in (".metadata", next(folder.glob("*.distcp")).name):
        content = bytearray((tmp_path / "whole" / name).read_bytes())
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
            content[place] = data.draw(st.integers(0, 255))
        (folder / name).write_bytes(content)
    with contextlib.suppress(InputError):
        read_all(folder)


def test_boxes_that_fill_a_shape() -> None:
    columns = [((r, 2 * c), (4, 2)) for c in range(3) for r in (0, 4)]
    assert fill_exactly(columns, (8, 6))
    assert fill_exactly([((0, 0), (3, 2)), ((3, 0), (5, 2)), ((0, 2), (5, 4)), ((5, 2), (3, 4))], (8, 6))
    assert not fill_exactly(columns[:-1], (8, 6))
    assert not fill_exactly([*columns[:-1], columns[0]], (8, 6))
    assert fill_exactly([((0, 0), (8, 6))], (8, 6))
    assert not fill_exactly([((2, 0), (8, 6))], (8, 6))
    assert not fill_exactly([((2, 0), (4, 6)), ((6, 0), (4, 6))], (8, 6))
    assert fill_exactly([((), ())], ())
    assert not fill_exactly([((), ()), ((), ())], ())
    assert fill_exactly([], (0, 6))
