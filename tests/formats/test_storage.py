"""Tensors that are read when asked for: block by block, whole, and compared with each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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
