"""A checkpoint of hundreds of megabytes is read within the memory of one tensor, whichever container it is in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers import PEAK_RESIDENT

PARTS, ROWS, COLUMNS = 16, 1024, 8192
TENSOR_BYTES = 4 * ROWS * COLUMNS
READ = (
    PEAK_RESIDENT
    + """
import sys
from pathlib import Path
from retnet_tools.formats.files import CheckpointFiles
tensors = CheckpointFiles(Path(sys.argv[1])).tensors
before = peak_resident()
for name in tensors.names():
    assert tensors.read(name).max() == 0
print(peak_resident() - before)
"""
)


def sparse_safetensors(file: Path) -> None:
    header = {
        f"t{i}": {
            "dtype": "F32",
            "shape": [ROWS, COLUMNS],
            "data_offsets": [i * TENSOR_BYTES, (i + 1) * TENSOR_BYTES],
        }
        for i in range(PARTS)
    }
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + PARTS * TENSOR_BYTES)


def sparse_torch(file: Path) -> None:
    with torch.serialization.skip_data():
        torch.save({f"t{i}": torch.empty(ROWS, COLUMNS) for i in range(PARTS)}, file)


@pytest.mark.parametrize(
    ("name", "write"),
    [("model.safetensors", sparse_safetensors), ("model.pt", sparse_torch)],
    ids=["safetensors", "torch"],
)
def test_reading_all_tensors_holds_one(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    file = tmp_path / name
    write(file)
    command = [sys.executable, "-c", READ, str(file)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert file.stat().st_size > 10 * TENSOR_BYTES
    assert grown < 3 * TENSOR_BYTES
