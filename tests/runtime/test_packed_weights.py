"""Packed weights that are kept between runs: the same numbers, found again only where nothing has changed, and never
needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest

from retnet_tools.errors import InputError
from retnet_tools.graph.contract import DECODER_FILE, WEIGHTS_FILE
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.runtime import packed_weights as packed
from retnet_tools.runtime.session import DecoderSession
from retnet_tools.staging import staged_folder
from retnet_tools.weights import Array
from tests.exports import export
from tests.helpers import ABLATIONS, BASE, random_source, random_tokens
from tests.quantized import quantize
from tests.reference import reference_logits
from tests.tolerances import GRAPH_FLOAT16

IDS = random_tokens(BASE, 2, 9, seed=1)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("packed")
    made = {"float32": export(BASE, random_source(BASE, 2), root / "float32")}
    made["float16"] = export(BASE, random_source(BASE, 2), root / "float16", dtype="float16")
    return made | {kind: quantize(made["float32"], root / kind, kind, block_size=32) for kind in ("int8", "int4")}


@pytest.fixture
def out(exports: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exports["int8"], tmp_path / "out"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(packed.VARIABLE, str(folder))
    monkeypatch.setattr(packed, "LEAST_BYTES", 0)
    return folder / "packed"


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The graphs that are packed in order to be kept, as it happens."""
    found: list[Path] = []
    pack = packed.open_session

    def seen(path: Path, *args, **options):
        found.extend([path] if "keep" in options else [])
        return pack(path, *args, **options)

    monkeypatch.setattr(packed, "open_session", seen)
    return found


def logits(folder: Path) -> Array:
    """After a chunk and a step."""
    with DecoderSession(folder, threads=1) as session:
        state = session.new_state(len(IDS))
        chunk = session.prefill(IDS[:, :8], state)
        return np.stack([chunk, session.step(IDS[:, 8], state)])


def unkept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Array:
    with monkeypatch.context() as context:
        context.setenv(packed.VARIABLE, "off")
        return logits(folder)


def kept(cache: Path) -> list[Path]:
    return sorted(path.parent for path in cache.glob(f"*/{DECODER_FILE}"))


def is_kept_again(cache: Path, folder: Path) -> bool:
    """Whether opening an export adds a graph to those that are kept."""
    before = kept(cache)
    logits(folder)
    return kept(cache) != before


@pytest.mark.parametrize("kind", ["int8", "int4", "float16"])
def test_a_kept_graph_gives_the_same_bits(
    kind: str, exports: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = unkept(exports[kind], monkeypatch)
    for _ in range(3):
        np.testing.assert_array_equal(logits(exports[kind]), expected)
    assert len(kept(cache)) == 1
    if kind == "float16":
        wide = reference_logits(BASE, random_source(BASE, 2), IDS)[:, [7, 8]].swapaxes(0, 1)
        np.testing.assert_allclose(expected, wide, rtol=0, atol=GRAPH_FLOAT16)


@pytest.mark.parametrize("vocab_size", [61, 64, 77, 129])
def test_matrices_of_any_size_lie_where_their_kernels_look_for_them(
    vocab_size: int, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MatMulNBits rounds an address up to a multiple of 64 before it reads, and ONNX Runtime maps what it wrote."""
    config = replace(ABLATIONS["other_head_sizes"], vocab_size=vocab_size)
    floats = export(config, random_source(config, 3), tmp_path / "floats")
    for kind, size in (("int8", 32), ("int4", 32), ("int4", 64)):
        folder = quantize(floats, tmp_path / f"{kind}-{size}", kind, block_size=size)
        np.testing.assert_array_equal(logits(folder), unkept(folder, monkeypatch))
    offsets = [
        int(blob.split(";")[0])
        for entry in kept(cache)
        for tensor in onnx.load(entry / DECODER_FILE, load_external_data=False).graph.initializer
        for item in tensor.external_data
        if item.key.startswith("prepacked")
        for blob in item.value.split("|")[1:]
    ]
    assert len(offsets) >= 20
    assert {offset % 64 for offset in offsets} == {0}


def test_it_is_packed_once(out: Path, cache: Path, packings: list[Path]) -> None:
    for _ in range(3):
        logits(out)
    assert packings == [out / DECODER_FILE]


def test_what_changes_in_the_export_or_around_it_is_packed_anew(
    out: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_kept_again(cache, out)
    assert not is_kept_again(cache, out)
    os.utime(out / WEIGHTS_FILE, ns=(1, 1))
    assert is_kept_again(cache, out)
    os.utime(out / DECODER_FILE, ns=(1, 1))
    assert is_kept_again(cache, out)
    assert not is_kept_again(cache, out)
    with monkeypatch.context() as context:
        context.setattr(onnxruntime, "__version__", "1.99.0")
        assert is_kept_again(cache, out)
    with monkeypatch.context() as context:
        context.setattr(packed, "processor_features", lambda: "another processor")
        assert is_kept_again(cache, out)
        assert not is_kept_again(cache, out)
    assert not is_kept_again(cache, out)


def test_other_weights_in_the_same_place_are_never_mistaken(
    out: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = logits(out)
    other = quantize(
        export(BASE, random_source(BASE, 4), tmp_path / "floats"), tmp_path / "other", "int8", block_size=32
    )
    for file in other.iterdir():
        shutil.copy(file, out / file.name)
        os.utime(out / file.name, ns=(5, 5))
    np.testing.assert_array_equal(logits(out), unkept(other, monkeypatch))
    assert (logits(out) != before).any()


def test_a_file_that_was_written_in_place_is_read_again(
    out: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest still says the old sha256."""
    before = logits(out)
    weights = bytearray((out / WEIGHTS_FILE).read_bytes())
    half = len(weights) // 2
    weights[half:] = bytes(len(weights) - half)
    (out / WEIGHTS_FILE).write_bytes(weights)
    after = logits(out)
    np.testing.assert_array_equal(after, unkept(out, monkeypatch))
    assert not np.array_equal(after, before)


@pytest.mark.parametrize("kind", ["off", "float32", "few", "too many", "no records"])
def test_nothing_is_kept_where_it_is_not_wanted(
    kind: str, exports: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exports["float32" if kind == "float32" else "int8"]
    size, manifest = (folder / WEIGHTS_FILE).stat().st_size, read_manifest(folder)
    changes: dict[str, Callable[[], None]] = {
        "off": lambda: monkeypatch.setenv(packed.VARIABLE, "off"),
        "few": lambda: monkeypatch.setattr(packed, "LEAST_BYTES", size + 1),
        "too many": lambda: monkeypatch.setattr(packed, "LIMIT", 2 * size - 1),
    }
    changes.get(kind, lambda: None)()
    given = replace(manifest, files={}) if kind == "no records" else manifest
    assert packed.packed_graph(folder, given, DECODER_FILE, 1) is None
    assert not cache.exists()


def test_the_places_where_graphs_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (packed.VARIABLE, "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert packed.cache_folder() == tmp_path / ".cache" / "retnet-tools" / "packed"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert packed.cache_folder() == tmp_path / "xdg" / "retnet-tools" / "packed"
    monkeypatch.setenv(packed.VARIABLE, str(tmp_path / "own"))
    assert packed.cache_folder() == tmp_path / "own" / "packed"
    monkeypatch.setenv(packed.VARIABLE, "off")
    assert packed.cache_folder() is None


def test_no_test_writes_to_the_users_cache() -> None:
    assert os.environ[packed.VARIABLE] == "off"


def refuse(*_: object) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("kind", ["a file", "under a file", "full", "not to be looked into"])
def test_a_place_that_takes_nothing_is_done_without(
    kind: str, out: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = unkept(out, monkeypatch)
    if kind == "a file":
        cache.parent.mkdir()
        cache.write_bytes(b"")
    elif kind == "under a file":
        cache.parent.mkdir()
        cache.write_bytes(b"")
        monkeypatch.setenv(packed.VARIABLE, str(cache / "deeper"))
    elif kind == "full":
        monkeypatch.setattr("retnet_tools.staging.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    else:
        monkeypatch.setattr(packed, "_make_room", refuse)
    np.testing.assert_array_equal(logits(out), expected)
    assert kept(cache) == []


def test_a_disk_that_becomes_full_leaves_nothing_behind(
    out: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path, *args, keep: Path, **options) -> None:
        keep.write_bytes(b"half")
        raise InputError(f"{path} cannot be opened (No space left on device)")

    monkeypatch.setattr(packed, "open_session", fails)
    np.testing.assert_array_equal(logits(out), unkept(out, monkeypatch))
    assert not cache.exists() or not [path for path in cache.rglob("*") if path.is_file()]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "half a graph": lambda entry: cut(entry / DECODER_FILE),
    "an empty graph": lambda entry: (entry / DECODER_FILE).write_bytes(b""),
    "no graph": lambda entry: (entry / DECODER_FILE).write_bytes(b"\xff" * 1000),
    "half of the weights": lambda entry: cut(entry / "decoder.data"),
    "the last byte": lambda entry: os.truncate(entry / "decoder.data", (entry / "decoder.data").stat().st_size - 1),
    "empty weights": lambda entry: (entry / "decoder.data").write_bytes(b""),
    "no weights": lambda entry: (entry / "decoder.data").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_kept_graph_that_is_broken_is_removed_and_the_export_itself_opened(
    damage: str, out: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(out)
    (entry,) = kept(cache)
    DAMAGES[damage](entry)
    with caplog.at_level("INFO", "retnet_tools"):
        monkeypatch.setattr(packed.LOG, "propagate", True)
        np.testing.assert_array_equal(logits(out), expected)
    assert "packing the weights anew" in caplog.text
    assert not entry.exists()
    np.testing.assert_array_equal(logits(out), expected)
    assert kept(cache) == [entry]


def test_an_export_that_is_broken_itself_says_so(out: Path, cache: Path) -> None:
    logits(out)
    (entry,) = kept(cache)
    DAMAGES["no graph"](entry)
    found = (out / DECODER_FILE).stat()
    (out / DECODER_FILE).write_bytes(b"\xff" * found.st_size)
    os.utime(out / DECODER_FILE, ns=(found.st_mtime_ns, found.st_mtime_ns))
    with pytest.raises(InputError, match=r"out/decoder\.onnx "):
        logits(out)


def test_another_process_that_is_at_it_is_not_waited_for(
    out: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, manifest = unkept(out, monkeypatch), read_manifest(out)
    target = cache / packed._key(out, manifest, DECODER_FILE)
    with staged_folder(target, marker=DECODER_FILE, required_bytes=0, force=True) as partial:
        np.testing.assert_array_equal(logits(out), expected)
        assert kept(cache) == []
        (partial / DECODER_FILE).write_bytes(b"")
    # What the other one left there is no graph.
    np.testing.assert_array_equal(logits(out), expected)
    assert kept(cache) == []


ALONE = """
import sys
import numpy as np
from pathlib import Path
from retnet_tools.runtime import packed_weights as packed
from retnet_tools.runtime.session import DecoderSession
packed.LEAST_BYTES = 0
print("ready", flush=True)
sys.stdin.readline()
with DecoderSession(Path(sys.argv[1]), threads=1) as session:
    state = session.new_state()
    print(session.prefill([[1, 2, 3, 4, 5]], state).tobytes().hex())
"""


def test_two_processes_at_once_give_the_same_and_keep_one_graph(
    out: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", ALONE, str(out)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    found = [process.communicate()[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    with DecoderSession(out, threads=1) as session:
        expected = session.prefill([[1, 2, 3, 4, 5]], session.new_state())
    assert found == [expected.tobytes().hex()] * 2
    assert len(kept(cache)) == 1
    assert [path for path in cache.iterdir() if path.suffix == ".partial"] == []


def test_the_oldest_make_room_for_a_new_one(
    exports: dict[str, Path], out: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = []
    for age, time in enumerate((30, 20, 10)):
        os.utime(out / WEIGHTS_FILE, ns=(age, age))
        logits(out)
        (new,) = set(kept(cache)) - set(entries)
        os.utime(new, (time, time))
        entries.append(new)
    size = sum(file.stat().st_size for file in entries[0].iterdir())
    needed = 2 * (out / WEIGHTS_FILE).stat().st_size
    monkeypatch.setattr(packed, "LIMIT", 2 * size + needed)
    os.utime(out / WEIGHTS_FILE, ns=(99, 99))
    logits(out)
    (new,) = set(kept(cache)) - set(entries)
    assert kept(cache) == sorted([entries[0], entries[1], new])


def test_folders_of_others_are_neither_counted_nor_removed(
    out: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room is made of what was kept alone, wherever the cache lies."""
    logits(out)
    (entry,) = kept(cache)
    theirs = cache / "models"
    theirs.mkdir()
    (theirs / "weights.bin").write_bytes(bytes(1 << 20))
    (cache / ("0" * 32)).symlink_to(theirs)
    assert list(packed.kept_bytes(cache)) == [entry]
    monkeypatch.setattr(packed, "LIMIT", 1)
    packed._make_room(cache, 0)
    assert not entry.exists()
    assert (theirs / "weights.bin").is_file()


def test_what_was_opened_last_stays_longest(out: Path, exports: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(exports["int4"], tmp_path / "other"))
    logits(out)
    (first,) = kept(cache)
    os.utime(first, (1, 1))
    logits(other)
    (second,) = (entry for entry in kept(cache) if entry != first)
    os.utime(second, (2, 2))
    logits(out)
    assert list(packed.kept_bytes(cache)) == [second, first]


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files here")
def test_a_cache_that_others_may_write_is_done_without(
    out: Path, cache: Path, packings: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(out)
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o777)
    np.testing.assert_array_equal(logits(out), expected)
    cache.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    assert packed.packed_graph(out, read_manifest(out), DECODER_FILE, 1) is None
    assert len(packings) == 1


def test_an_onnxruntime_that_writes_otherwise_is_done_without(
    out: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unforeseen(graph: Path) -> None:
        raise ValueError("not enough values to unpack")

    monkeypatch.setattr(packed, "_align_packed", unforeseen)
    np.testing.assert_array_equal(logits(out), unkept(out, monkeypatch))
    assert kept(cache) == []


def test_what_computes_otherwise_is_not_kept(
    out: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Small matrices, whose packed weights onnxruntime puts where kernels do not look for them."""
    expected = unkept(out, monkeypatch)
    monkeypatch.setattr(packed, "_align_packed", lambda graph: None)
    monkeypatch.setattr(packed.LOG, "propagate", True)
    with caplog.at_level("DEBUG", "retnet_tools"):
        np.testing.assert_array_equal(logits(out), expected)
    assert "computes otherwise" in caplog.text
    assert kept(cache) == []
