"""Files are what was written: sizes and hashes of exports, and what checkpoints say of themselves."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

import retnet_tools
from retnet_tools.errors import InputError
from retnet_tools.file_records import FileRecord
from retnet_tools.formats.integrity import check_checkpoint, require_intact
from retnet_tools.graph.manifest import read_manifest
from tests.exports import export
from tests.helpers import BASE, random_source

FIXTURE = Path(__file__).parents[2] / "fixtures" / "shakespeare"


def problems(*files: Path) -> list[tuple[str, str]]:
    return [(check.how, check.problem) for check in check_checkpoint(files, lambda count: None)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("integrity")
    return export(BASE, random_source(BASE, 5), folder / "out")


def test_the_manifest_has_size_and_sha256_of_every_other_file(exported: Path) -> None:
    document = json.loads((exported / "retnet.json").read_text())
    files = {file.name: file.read_bytes() for file in exported.iterdir() if file.name != "retnet.json"}
    assert document["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }
    assert {"weights.data", "step.onnx", "prefill.onnx"} <= files.keys()


@pytest.mark.parametrize("name", ["weights.data", "step.onnx", "prefill.onnx", "decoder.onnx"])
@pytest.mark.parametrize("change", ["shorter", "longer", "gone"])
def test_opening_an_export_checks_the_sizes_of_its_files(
    name: str, change: str, exported: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(exported, tmp_path / "out")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content + b"\0" if change == "longer" else content[:-1])
    if change == "gone":
        (folder / name).unlink()
    with pytest.raises(
        InputError, match=rf"{name} (is missing|has \d+ bytes); expected \d+ bytes, as retnet\.json says"
    ):
        read_manifest(folder)


def test_one_changed_byte_is_found_by_inspect_check(cli, exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "out")
    done = cli("inspect", folder, "--check", "--json")
    assert done.exit_code == 0
    checks = json.loads(done.out)["checks"]
    names = ("weights.data", "step.onnx", "prefill.onnx", "decoder.onnx")
    assert {check["name"]: check["problem"] for check in checks} == dict.fromkeys(names)
    assert {check["how"] for check in checks} == {"sha256"}
    with (folder / "weights.data").open("r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([byte ^ 1]))
    done = cli("inspect", folder, "--check", "--quick")
    assert done.exit_code == 5
    assert "check    weights.data: has another sha256 (sha256)" in done.out
    assert done.err.startswith("error: ")
    assert "weights.data has another sha256" in done.err


def test_an_export_without_hashes_says_so(cli, exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "out")
    document = json.loads((folder / "retnet.json").read_text())
    del document["files"]
    (folder / "retnet.json").write_text(json.dumps(document))
    assert cli("inspect", folder).exit_code == 0
    done = cli("inspect", folder, "--check")
    assert done.exit_code == 5
    assert "has no sizes and hashes of its files" in done.err


@pytest.mark.parametrize(
    "record",
    [
        *({}, {"bytes": 1}, {"bytes": -1, "sha256": "0" * 64}, {"bytes": True, "sha256": "0" * 64}, []),
        *({"bytes": 1, "sha256": "0" * 63}, {"bytes": 1, "sha256": "G" * 64}, {"bytes": 1, "sha256": 5}),
        {"bytes": 1, "sha256": "0" * 64, "x": 1},
    ],
)
def test_a_broken_record_is_refused(record: object, exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "out")
    document = json.loads((folder / "retnet.json").read_text())
    document["files"]["step.onnx"] = record
    (folder / "retnet.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"retnet\.json is not a manifest"):
        read_manifest(folder)


def test_entries_of_torch_files_have_checksums(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({"a": torch.arange(1000.0)}, file)
    assert problems(file) == [("crc32", "")]
    content = bytearray(file.read_bytes())
    at = content.index(torch.arange(1000.0).numpy().tobytes()) + 17
    content[at] ^= 1
    file.write_bytes(content)
    [(how, problem)] = problems(file)
    assert how == "crc32"
    assert "has a damaged entry 'model/data/0'" in problem
    with pytest.raises(InputError, match=r"model\.pt has a damaged entry"):
        require_intact(list(check_checkpoint([file], lambda count: None)))


@pytest.mark.parametrize("kind", ["sha256", "git-sha1"])
def test_the_hubs_cache_names_files_by_their_hash(kind: str, tmp_path: Path) -> None:
    content = b"weights of a model"
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    blob = tmp_path / "blobs" / (git if kind == "git-sha1" else hashlib.sha256(content).hexdigest())
    blob.parent.mkdir()
    blob.write_bytes(content)
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert problems(tmp_path / "model.safetensors") == [(kind, "")]
    blob.write_bytes(content.replace(b"o", b"0"))
    assert problems(tmp_path / "model.safetensors") == [(kind, f"has another {kind}")]


def test_an_index_gives_the_size_of_its_shards(cli, tmp_path: Path) -> None:
    assert cli("convert", "fixtures/shakespeare", tmp_path / "out", "--max-shard-size", "8MB").exit_code == 0
    done = cli("inspect", tmp_path / "out", "--check", "--quick")
    assert done.exit_code == 0, done.err
    assert "check    model.safetensors.index.json: good (size)" in done.out
    index = tmp_path / "out" / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["metadata"]["total_size"] += 4
    index.write_text(json.dumps(document))
    done = cli("inspect", tmp_path / "out", "--check", "--quick")
    assert done.exit_code == 5
    assert "model.safetensors.index.json says" in done.err


def test_a_record_is_of_the_file_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(bytes(range(256)) * 40_000)
    told: list[int] = []
    record = FileRecord.of(file)
    assert (record.bytes, record.sha256) == (10_240_000, hashlib.sha256(file.read_bytes()).hexdigest())
    assert record.problem(file, told.append) == ""
    assert sum(told) == record.bytes


def test_opening_an_export_checks_the_size_of_its_tokenizer(tmp_path: Path) -> None:
    out = tmp_path / "out"
    retnet_tools.export(FIXTURE, out)
    assert "tokenizer.json" in read_manifest(out).tokenizer_files
    (out / "tokenizer.json").write_bytes((out / "tokenizer.json").read_bytes()[:-1])
    with pytest.raises(InputError, match=r"tokenizer\.json has \d+ bytes"):
        read_manifest(out)


def test_a_model_is_known_by_its_sources(exported: Path) -> None:
    manifest = read_manifest(exported)
    prints = []
    for digest in ("0" * 64, "1" * 64):
        files = [{"name": "model.pt", "sha256": digest}]
        other = dataclasses.replace(manifest, provenance={**manifest.provenance, "source_files": files})
        prints.append(other.fingerprint())
    assert prints[0]["model"] != prints[1]["model"]
    assert prints[0] | {"model": ""} == prints[1] | {"model": ""}
