"""The exported folder: whole or not there, every tensor once, and one clear error for each thing that goes wrong."""

from __future__ import annotations

import errno
import hashlib
import itertools
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from retnet_tools.errors import InputError, OutputError, UsageError
from retnet_tools.graph import contract
from retnet_tools.graph import export as export_module
from retnet_tools.graph.export import default_output, plan_export, write_export
from retnet_tools.graph.manifest import read_manifest
from tests.exports import checkpoint, export
from tests.helpers import ABLATIONS, BASE, OTHER_LAYERS, MemorySource, random_source


def test_the_manifest_reads_back(tmp_path: Path) -> None:
    source_file = tmp_path / "weights.bin"
    source_file.write_bytes(b"weights")
    plan = plan_export(
        replace(checkpoint(BASE, random_source(BASE, 1)), source_files=[source_file], notes=["a note"]),
        dtype="float32",
        ops="standard",
    )
    written = write_export(plan, tmp_path / "out", force=False, progress=lambda count: None)
    manifest = read_manifest(tmp_path / "out")
    assert manifest == written
    assert manifest.config == BASE
    assert (manifest.dtype, manifest.state_dtype, manifest.ops) == ("float32", "float32", "standard")
    (file,) = manifest.provenance["source_files"]
    assert file == {"name": "weights.bin", "sha256": hashlib.sha256(b"weights").hexdigest()}
    assert manifest.provenance["notes"] == ["a note"]


@pytest.mark.parametrize("name", ["base", "tied", "torchscale_2023", *OTHER_LAYERS])
def test_weights_data_holds_every_tensor_once_and_bit_exact(name: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], 2)
    out = export(config, source, tmp_path / "out")
    plan = plan_export(checkpoint(config, source), dtype="float32", ops="fused")
    data = (out / contract.WEIGHTS_FILE).read_bytes()
    ranges = []
    stored = {}
    for tensor in onnx.load(out / contract.STEP_FILE, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert place["location"] == contract.WEIGHTS_FILE
            offset, length = int(place["offset"]), int(place["length"])
            ranges.append((offset, offset + length))
            stored[tensor.name] = np.frombuffer(data[offset : offset + length], np.float32).reshape(tensor.dims)
    ranges.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    named = [canonical for tensor in plan.tensors.values() for canonical in tensor.sources]
    assert sorted(named) == sorted(source.names())
    for tensor in plan.tensors.values():
        if tensor.sources:
            expected = np.concatenate([source.tensors[canonical] for canonical in tensor.sources])
            np.testing.assert_array_equal(stored[tensor.name], expected)


def test_weights_that_are_no_numbers_are_written_as_they_are_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = random_source(BASE, 2)
    source.tensors["layers.1.retention.k_proj.weight"][[0, 3, 5], 1] = np.nan, np.inf, -np.inf
    source.tensors["final_norm.weight"][7] = np.nan
    out = export(BASE, source, tmp_path / "out")
    note = (
        "NaN or infinite weights in layers.1.retention.k_proj.weight (3), final_norm.weight (1): all that they reach "
        "is NaN"
    )
    assert read_manifest(out).provenance["notes"] == [note]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [f"warning: {note}"]
    plan = export_module.plan_of_export(out)
    for name, tensor in source.tensors.items():
        np.testing.assert_array_equal(plan.checkpoint.weights.read(name), tensor)
    # What is made of it says so too.
    assert note in plan.notes


def test_a_value_beyond_float16_is_refused_by_tensor_name(tmp_path: Path) -> None:
    source = random_source(BASE, 3)
    source.tensors["layers.1.ffn.up_proj.weight"][3, 5] = 1e5
    with pytest.raises(InputError, match=r"layers\.1\.ffn\.up_proj\.weight.*100000.*float16.*bf16"):
        export(BASE, source, tmp_path / "out", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_without_force(tmp_path: Path) -> None:
    source = random_source(BASE, 4)
    out = export(BASE, source, tmp_path / "out")
    before = (out / contract.WEIGHTS_FILE).stat()
    with pytest.raises(UsageError, match=r"exists already.*--force"):
        export(BASE, source, out)
    assert (out / contract.WEIGHTS_FILE).stat() == before


def test_force_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    plan = plan_export(checkpoint(BASE, random_source(BASE, 5)), dtype="float32", ops="fused")
    out = export(BASE, random_source(BASE, 4), tmp_path / "out")
    write_export(plan, out, force=True, progress=lambda count: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not a folder that this command wrote"):
        write_export(plan, precious, force=True, progress=lambda count: None)
    assert (precious / "thesis.txt").read_text() == "years of work"


class _Failing(MemorySource):
    error: BaseException

    def read(self, name: str):
        if name.startswith("layers.1."):
            raise self.error
        return super().read(name)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, "the disk is full"),
        (OSError(errno.EACCES, "Permission denied"), OutputError, "Permission denied"),
        (InputError("file truncated"), InputError, "file truncated"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_failure_in_the_middle_leaves_nothing(
    error: BaseException, raised: type[BaseException], message: str, tmp_path: Path
) -> None:
    source = _Failing(random_source(BASE, 6).tensors)
    object.__setattr__(source, "error", error)
    with pytest.raises(raised, match=message):
        export(BASE, source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_forced_export_keeps_the_old_one(tmp_path: Path) -> None:
    out = export(BASE, random_source(BASE, 7), tmp_path / "out")
    before = (out / contract.WEIGHTS_FILE).read_bytes()
    source = _Failing(random_source(BASE, 8).tensors)
    object.__setattr__(source, "error", OSError(errno.ENOSPC, "No space left on device"))
    plan = plan_export(checkpoint(BASE, source), dtype="float32", ops="fused")
    with pytest.raises(OutputError):
        write_export(plan, out, force=True, progress=lambda count: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert (out / contract.WEIGHTS_FILE).read_bytes() == before


def test_a_disk_that_is_too_small_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, 10**6))
    with pytest.raises(OutputError, match=r"0\.00 GB free.*expected 0\.01 GB"):
        export(BASE, random_source(BASE, 9), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_files_of_other_names_survive_force(tmp_path: Path) -> None:
    out = export(BASE, random_source(BASE, 10), tmp_path / "out")
    (out / "ckpt").mkdir()
    (out / "ckpt" / "model.safetensors").write_bytes(b"years of training")
    (out / "notes.txt").write_text("mine")
    plan = plan_export(checkpoint(BASE, random_source(BASE, 11)), dtype="float32", ops="fused")
    write_export(plan, out, force=True, progress=lambda count: None)
    assert (out / "ckpt" / "model.safetensors").read_bytes() == b"years of training"
    assert (out / "notes.txt").read_text() == "mine"


def test_links_are_followed_and_empty_folders_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export(BASE, random_source(BASE, 12), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / contract.MANIFEST_FILE).is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(BASE, random_source(BASE, 12), Path("."))
    assert (tmp_path / "here" / contract.MANIFEST_FILE).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link", "real"]


def test_folders_made_for_a_failed_export_are_removed(tmp_path: Path) -> None:
    source = random_source(BASE, 13)
    source.tensors["layers.1.ffn.up_proj.weight"][0, 0] = 1e6
    with pytest.raises(InputError):
        export(BASE, source, tmp_path / "a" / "b" / "out", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_cannot_be_read_is_no_fault_of_the_output(tmp_path: Path) -> None:
    source = _Failing(random_source(BASE, 14).tensors)
    object.__setattr__(source, "error", PermissionError(errno.EACCES, "Permission denied", "/elsewhere/model.pt"))
    with pytest.raises(InputError, match=r"cannot read /elsewhere/model\.pt \(Permission denied\)"):
        export(BASE, source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_graphs_are_written_after_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        export_module, "write_graph", lambda path, *_, **__: seen.append((path, *path.parent.iterdir()))
    )
    export(BASE, random_source(BASE, 11), tmp_path / "out")
    assert [[path.name for path in paths] for paths in seen] == [
        [contract.PREFILL_FILE, contract.WEIGHTS_FILE],
        [contract.STEP_FILE, contract.WEIGHTS_FILE],
        [contract.DECODER_FILE, contract.WEIGHTS_FILE],
    ]
    assert seen[0][0].parent.name == ".out.partial"


def test_an_unknown_operator_set_is_refused() -> None:
    with pytest.raises(UsageError, match=r"expected one of standard, fused; did you mean 'fused'\?"):
        plan_export(checkpoint(BASE, random_source(BASE, 1)), dtype="float32", ops="fuse")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("ckpt", "ckpt-onnx"),
        ("runs/ckpt/", "runs/ckpt-onnx"),
        ("model.v2", "model.v2-onnx"),
        ("..", f"{Path.cwd().parent}-onnx"),
    ],
)
def test_the_default_output_lies_beside_the_checkpoint(path: str, expected: str) -> None:
    assert default_output(Path(path)) == Path(expected)


def test_the_default_output_of_a_file_drops_its_ending(tmp_path: Path) -> None:
    (tmp_path / "model.pt").touch()
    assert default_output(tmp_path / "model.pt") == tmp_path / "model-onnx"
    assert default_output(Path(".")) == Path.cwd().with_name(f"{Path.cwd().name}-onnx")
