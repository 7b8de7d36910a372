"""Tensors that are read when asked for: block by block, whole, and compared with each other."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retnet_tools.errors import InputError
from retnet_tools.formats import storage
from retnet_tools.formats.storage import PlannedTensor, TensorLocation


def located(path: Path, shape: tuple[int, ...]) -> TensorLocation:
    return TensorLocation(shape, np.dtype("<f4"), path, 0, storage.contiguous_strides(shape))


def test_a_tensor_in_several_blocks_is_read_whole() -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    made = PlannedTensor(values.shape, values.dtype, "x", lambda: (values[i : i + 1] for i in range(4)))
    np.testing.assert_array_equal(made.read(), values)
    made = PlannedTensor((), values.dtype, "x", lambda: iter((values[0, 0],)))
    assert made.read().shape == ()


def test_equal_bytes_in_other_shapes_or_types_are_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BLOCK_BYTES", 16)
    values = np.arange(12, dtype=np.float32)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(values.tobytes())
    (tmp_path / "c").write_bytes((values + (np.arange(12) == 11)).astype(np.float32).tobytes())
    first = located(tmp_path / "a", (4, 3))
    assert first.same_data(located(tmp_path / "b", (4, 3)))
    assert not first.same_data(located(tmp_path / "c", (4, 3)))
    assert not first.same_data(located(tmp_path / "b", (4, 1, 3)))
    assert not first.same_data(TensorLocation((4, 3), np.dtype("<i4"), tmp_path / "b", 0, (3, 1)))


def test_a_system_that_reads_a_little_at_a_time_gives_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Linux does past 2 GiB."""
    values, opened = np.arange(12, dtype=np.float32).reshape(4, 3), Path.open

    class Slow(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            return super().readinto(memoryview(buffer)[:5])

    (tmp_path / "a").write_bytes(values.tobytes())
    monkeypatch.setattr(Path, "open", lambda path, *mode, **options: Slow(path))
    np.testing.assert_array_equal(located(tmp_path / "a", (4, 3)).read(), values)
    monkeypatch.setattr(Path, "open", opened)
    (tmp_path / "a").write_bytes(values.tobytes()[:-1])
    with pytest.raises(InputError, match="ends 1 bytes inside a tensor"):
        located(tmp_path / "a", (4, 3)).read()


@pytest.mark.parametrize("rows", [1, 4, 5, 7])
def test_rows_come_once_each_however_many_fit_into_a_block(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BLOCK_BYTES", 4 * 3 * 2)
    ranges = list(located(Path("a"), (rows, 3)).row_ranges())
    assert [n for start, count in ranges for n in range(start, start + count)] == list(range(rows))
