"""Results on disk: whole or not there, found again under the same hash, gone under another."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from retnet_tools.errors import OutputError, UsageError
from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.quantize.blockwise import quantize_rows
from retnet_tools.quantize.unfinished import Workplace, hash_work, unfinished_folder
from tests.helpers import BASE, random_source
from tests.quantize.test_blockwise import weights

FORMAT = BlockFormat(4, 32, True)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_type", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_codes_come_back_as_they_were(symmetric: bool, scale_type: type, tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    work = place.open("gptq", "0" * 64)
    rows = quantize_rows(weights(5, 70), BlockFormat(4, 32, symmetric), np.dtype(scale_type))
    assert "layers.0.ffn.up_proj.weight.npz" not in work
    work.save_rows("layers.0.ffn.up_proj.weight", rows)
    again = place.open("gptq", "0" * 64)
    assert "layers.0.ffn.up_proj.weight.npz" in again
    found = again.load_rows("layers.0.ffn.up_proj.weight", np.dtype(scale_type))
    np.testing.assert_array_equal(found.codes, rows.codes)
    assert found.scales.dtype == scale_type
    np.testing.assert_array_equal(found.scales, rows.scales)
    assert (found.zero_points is None) == symmetric
    if not symmetric:
        np.testing.assert_array_equal(found.zero_points, rows.zero_points)


def test_a_result_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    work = place.open("gptq", "0" * 64)

    def write_half(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), work.writing("states") as path:
        write_half(path)
    assert "states" not in work
    assert list(place.open("gptq", "0" * 64).folder.iterdir()) == []


def test_work_under_another_hash_is_removed_and_of_another_kind_is_not(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    for kind, key in (("gptq", "0"), ("sensitivity", "0"), ("gptq", "1")):
        with place.open(kind, key * 64).writing("result") as path:
            path.write_text("done")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        f"gptq-{'1' * 32}",
        f"sensitivity-{'0' * 32}",
    ]


def test_only_what_was_opened_is_removed_and_the_folder_with_it_where_nothing_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    with Workplace(folder) as first:
        first.open("gptq", "0" * 64)
        assert first.kept
    with Workplace(folder) as second:
        assert not second.kept
        second.remove()
        assert (folder / f"gptq-{'0' * 32}").is_dir()
        second.open("sensitivity", "0" * 64)
        second.remove()
        assert not second.kept
    assert [path.name for path in folder.iterdir()] == [f"gptq-{'0' * 32}"]
    with Workplace(folder) as third:
        third.open("gptq", "1" * 64)
        third.remove()
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_work_in_one_place(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from retnet_tools.quantize.unfinished import Workplace\n"
        "with Workplace(Path(sys.argv[1])) as work:\n"
        "    work.open('gptq', '0' * 64); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(UsageError, match=r"another process writes to .*; expected one at a time"):
            Workplace(tmp_path).open("gptq", "1" * 64)
        assert (tmp_path / f"gptq-{'0' * 32}").is_dir()
        other.stdin.close()
    with Workplace(tmp_path) as work:
        work.open("gptq", "0" * 64)


def test_results_are_on_the_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync") or sync(file))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("replace") or rename(*names))
    work = Workplace(tmp_path).open("gptq", "0" * 64)
    calls.clear()
    with work.writing("states") as path:
        path.write_text("all")
    assert calls == ["fsync", "replace", "fsync"]


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*file/work \((Not a directory|File exists)\)"):
        Workplace(tmp_path / "file" / "work").open("gptq", "0" * 64)


def test_the_folder_lies_beside_the_output(tmp_path: Path) -> None:
    assert unfinished_folder(tmp_path / "out") == tmp_path / ".out.unfinished"


def test_the_hash_depends_on_everything() -> None:
    source, ids = random_source(BASE, 1), np.arange(8).reshape(2, 4)
    base = hash_work(BASE, source, {"a": FORMAT, "b": None}, ids, dtype="float32")
    changed = random_source(BASE, 1)
    changed.tensors["final_norm.weight"][3] += np.float32(1e-6)
    half = random_source(BASE, 1, np.float16)
    others = [
        hash_work(replace(BASE, embedding_scale=2.0), source, {"a": FORMAT, "b": None}, ids, dtype="float32"),
        hash_work(BASE, changed, {"a": FORMAT, "b": None}, ids, dtype="float32"),
        hash_work(BASE, half, {"a": FORMAT, "b": None}, ids, dtype="float32"),
        hash_work(BASE, source, {"a": None, "b": FORMAT}, ids, dtype="float32"),
        hash_work(BASE, source, {"a": replace(FORMAT, bits=8), "b": None}, ids, dtype="float32"),
        hash_work(BASE, source, {"a": FORMAT, "b": None}, ids.reshape(4, 2), dtype="float32"),
        hash_work(BASE, source, {"a": FORMAT, "b": None}, ids + 1, dtype="float32"),
        hash_work(BASE, source, {"a": FORMAT, "b": None}, ids, dtype="float16"),
    ]
    assert len({base, *others}) == len(others) + 1
    assert base == hash_work(BASE, random_source(BASE, 1), {"a": FORMAT, "b": None}, ids.copy(), dtype="float32")


def test_all_that_decides_a_result_is_part_of_its_hash() -> None:
    formats = {"lm_head.weight": BlockFormat(4, 32, True)}

    def key(seed: int = 1, tokens: int = 3, block: int = 32, dtype: str = "float32") -> str:
        given = {name: replace(format, block_size=block) for name, format in formats.items()}
        return hash_work(BASE, random_source(BASE, seed), given, np.array([[1, 2, tokens]]), dtype=dtype)

    keys = [key(), key(seed=2), key(tokens=4), key(block=64), key(dtype="float16")]
    assert key() == keys[0]
    assert len(set(keys)) == 5
