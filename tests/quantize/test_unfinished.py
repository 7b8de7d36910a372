"""Results on disk: whole or not there, found again under the same hash, gone under another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from retnet_tools.graph.quantization import BlockFormat
from retnet_tools.quantize.blockwise import quantize_rows
from retnet_tools.quantize.unfinished import Unfinished, hash_work, unfinished_folder
from tests.helpers import BASE, random_source
from tests.quantize.test_blockwise import weights

FORMAT = BlockFormat(4, 32, True)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_type", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_codes_come_back_as_they_were(symmetric: bool, scale_type: type, tmp_path: Path) -> None:
    work = Unfinished(tmp_path, "gptq", "0" * 64)
    rows = quantize_rows(weights(5, 70), BlockFormat(4, 32, symmetric), np.dtype(scale_type))
    assert not work.has_rows("layers.0.ffn.up_proj.weight")
    work.save_rows("layers.0.ffn.up_proj.weight", rows)
    again = Unfinished(tmp_path, "gptq", "0" * 64)
    assert again.has_rows("layers.0.ffn.up_proj.weight")
    found = again.load_rows("layers.0.ffn.up_proj.weight", np.dtype(scale_type))
    np.testing.assert_array_equal(found.codes, rows.codes)
    assert found.scales.dtype == scale_type
    np.testing.assert_array_equal(found.scales, rows.scales)
    assert (found.zero_points is None) == symmetric
    if not symmetric:
        np.testing.assert_array_equal(found.zero_points, rows.zero_points)


def test_a_result_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    work = Unfinished(tmp_path, "gptq", "0" * 64)

    def write_half(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), work.writing("states") as path:
        write_half(path)
    assert "states" not in work
    assert list(Unfinished(tmp_path, "gptq", "0" * 64).folder.iterdir()) == []


def test_work_under_another_hash_is_removed_and_of_another_kind_is_not(tmp_path: Path) -> None:
    for kind, key in (("gptq", "0"), ("sensitivity", "0"), ("gptq", "1")):
        with Unfinished(tmp_path, kind, key * 64).writing("result") as path:
            path.write_text("done")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"gptq-{'1' * 32}", f"sensitivity-{'0' * 32}"]


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
