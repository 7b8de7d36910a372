"""A file is told by its first bytes, a folder by the files in it."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from retnet_tools.errors import InputError
from retnet_tools.formats.content import FileKind, candidates, kind_of
from retnet_tools.formats.files import CheckpointFiles
from tests.formats.cases import TEXT_FILES, write_torchscale

STATE = {"layers.0.weight": torch.ones(2, 3), "norm.bias": torch.zeros(2)}
NAMES = ["model.pt", "last.ckpt", "model_best.pth.tar", "pytorch_model", "checkpoint_5", "weights.bin", "m.th", "x.pkl"]


def write(path: Path, container: str) -> None:
    if container == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=container == "zip")


@pytest.mark.parametrize("container", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_read_by_itself_and_in_its_folder(tmp_path: Path, name: str, container: str) -> None:
    write(tmp_path / name, container)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("(a text")
    (tmp_path / "vocab.pkl").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / ".hidden.pt").write_bytes((tmp_path / name).read_bytes())
    np.savez(tmp_path / "golden.npz", a=np.ones(2))
    for path in (tmp_path, tmp_path / name):
        files = CheckpointFiles(path)
        assert files.weights_file == tmp_path / name
        assert set(files.tensors.names()) == set(STATE)


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_legacy_files_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    torch.save(STATE, tmp_path / "model", pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    assert kind_of(tmp_path / "model") is FileKind.TORCH
    assert set(CheckpointFiles(tmp_path).tensors.names()) == set(STATE)


@pytest.mark.parametrize(
    "beside",
    [
        *("optimizer.pt", "optimizer.bin", "optimizer_1.pt", "optim-00001.pt", "scheduler.pt", "rng_state.pth"),
        *("rng_state_3.pth", "training_args.bin", "scaler.pt", "random_states_0.pkl", "trainer_state.pt"),
        *("zero_pp_rank_0_mp_rank_00_optim_states.pt", "sampler.bin", "dl_state_dict-0.pt"),
    ],
)
def test_what_trainers_put_beside_weights_is_no_candidate(tmp_path: Path, beside: str) -> None:
    write(tmp_path / "last.ckpt", "zip")
    write(tmp_path / beside, "zip")
    assert candidates(tmp_path) == [tmp_path / "last.ckpt"]


def test_order_of_candidates(tmp_path: Path) -> None:
    write(tmp_path / "b.ckpt", "zip")
    write(tmp_path / "a", "safetensors")
    with pytest.raises(InputError, match=r"several files of weights: a, b\.ckpt"):
        CheckpointFiles(tmp_path).weights_file  # noqa: B018
    # The last four in the order in which transformers looks for them, from the last on.
    usual = ("pytorch_model.bin.index.json", "pytorch_model.bin", "model.safetensors.index.json", "model.safetensors")
    for name in (".metadata", "x.index.json", *usual):
        (tmp_path / name).write_bytes(b"")
        assert candidates(tmp_path) == [tmp_path / name]


FOREIGN = {
    "model.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "run git lfs pull"),
    "pytorch_model.bin": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git-LFS pointer"),
    "flax_model.msgpack": (b"\x82\xa6params\x81\xa5model", "JAX/Flax"),
    "flax_checkpoint": (b"\xde\x00\x20\xa6params\x81\xa5model", "JAX/Flax"),
    "model.gguf": (b"GGUF\x03\x00\x00\x00", "GGUF"),
    "tf_model.h5": (b"\x89HDF\r\n\x1a\n\x00", "HDF5/Keras"),
    "model.ckpt.index": (b"\x00\x00\x12\x08", "TensorFlow"),
    "model.ckpt-100.data-00000-of-00001": (b"\x00\x00\x12\x08", "TensorFlow"),
    "saved_model.pb": (b"\x08\x01\x12", "TensorFlow"),
    "model.onnx": (b"\x08\x0a\x12\x07pytorch", "ONNX graph"),
    "graph": (b"\x08\x0a\x12\x07pytorch", "ONNX graph"),
    "weights.npy": (b"\x93NUMPY\x01\x00", "NumPy array"),
    "model.pt.gz": (b"\x1f\x8b\x08\x00", "compressed archive; .*unpack"),
    "pytorch_model.pth": (b"<!DOCTYPE html><html>", "a web page, not the file"),
    "empty.pt": (b"", "is empty"),
    "model.keras": (b"PK\x03\x04" + bytes(40), "Keras"),
    "zeros.bin": (bytes(100), "truncated or corrupt"),
    "photo.jpg": (b"\xff\xd8\xff\xe0", "no file of weights"),
    "config.json": (b'{"model_type": "retnet"}', "JSON without weights"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_files_are_refused_by_what_they_are(tmp_path: Path, name: str) -> None:
    content, match = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=match) as caught:
        CheckpointFiles(tmp_path / name)
    assert len(str(caught.value)) <= 200
    assert name in str(caught.value)
    assert caught.value.exit_code == 5


def test_archives_are_refused_by_what_they_are(tmp_path: Path) -> None:
    write(tmp_path / "model.pt", "zip")
    with tarfile.open(tmp_path / "model.tar", "w") as archive:
        archive.add(tmp_path / "model.pt", "model.pt")
    shutil.make_archive(str(tmp_path / "model"), "zip", tmp_path, "model.pt")
    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    for name, what in (("model.tar", "a tar archive"), ("model.zip", "a zip archive"), ("arrays.npz", "a zip archive")):
        with pytest.raises(InputError, match=rf"{name} is {what}; .*; unpack it"):
            CheckpointFiles(tmp_path / name)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torch_script_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), buffer)
    (tmp_path / "model.pt").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match=r"model\.pt is TorchScript"):
        CheckpointFiles(tmp_path).tensors  # noqa: B018


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(STATE))
    with pytest.raises(InputError, match=r"a pickle that torch\.save did not write"):
        CheckpointFiles(tmp_path / "model.pkl").tensors  # noqa: B018


def test_long_names_are_cut_in_messages(tmp_path: Path) -> None:
    name = "x" * 200 + ".gguf"
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(InputError) as caught:
        CheckpointFiles(tmp_path / name)
    assert len(str(caught.value)) <= 200


def test_one_named_configuration(tmp_path: Path) -> None:
    write(tmp_path / "model.pt", "zip")
    (tmp_path / "config.json").write_text('{"a": 1}')
    named = tmp_path / "elsewhere" / "my.json"
    named.parent.mkdir()
    named.write_text('{"b": 2}')
    assert CheckpointFiles(tmp_path).configs == {tmp_path / "config.json": {"a": 1}}
    assert CheckpointFiles(tmp_path, config=named).configs == {named: {"b": 2}}
    for content, match in (("[1]", "no JSON object"), ("{", "cannot be read as JSON")):
        named.write_text(content)
        with pytest.raises(InputError, match=match):
            CheckpointFiles(tmp_path, config=named).configs  # noqa: B018
    with pytest.raises(InputError, match="no such file"):
        CheckpointFiles(tmp_path, config=tmp_path / "none.json").configs  # noqa: B018


def test_a_configuration_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    write(tmp_path / "model.pt", "zip")
    (tmp_path / "config.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert CheckpointFiles(tmp_path).configs == {tmp_path / "config.json": {"a": 1}}


def test_configurations_are_json_objects_of_any_name(tmp_path: Path) -> None:
    write(tmp_path / "model.pt", "zip")
    for name, content in {"z.json": {"z": 1}, "args.json": {"a": 1}, "list.json": [], "x.index.json": {}}.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "broken.json").write_text("{")
    assert list(CheckpointFiles(tmp_path / "model.pt").configs) == [tmp_path / "args.json", tmp_path / "z.json"]


def test_every_file_of_a_models_text_is_found_and_is_no_configuration(tmp_path: Path) -> None:
    write_torchscale(tmp_path)
    for name in TEXT_FILES:
        (tmp_path / name).write_text("{}")
    files = CheckpointFiles(tmp_path)
    assert [file.name for file in files.tokenizer_files] == sorted(TEXT_FILES)
    assert [file.name for file in files.configs] == ["args.json"]


def test_cards_and_licences_of_either_spelling_are_found(tmp_path: Path) -> None:
    names = ["LICENCE.txt", "LICENSE", "NOTICE", "README.md"]
    for name in (*names, "notes.md"):
        (tmp_path / name).write_text("")
    assert [file.name for file in CheckpointFiles(tmp_path).card_files] == names
