"""A checkpoint of hundreds of megabytes is read within the memory of one tensor, whichever container it is in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from retnet_tools.formats.storage import BLOCK_BYTES
from tests.helpers import PEAK_RESIDENT

PARTS, ROWS, COLUMNS = 11, 1024, 8192
TENSOR_BYTES = 4 * ROWS * COLUMNS
SLACK = 4_000_000  # of the interpreter
READ = (
    PEAK_RESIDENT
    + """
import sys
from pathlib import Path
from retnet_tools.formats.files import CheckpointFiles
tensors = CheckpointFiles(Path(sys.argv[1])).tensors
before = peak_resident()
for name in tensors.names():
    for part in tensors.blocks(name) if sys.argv[2] == "blocks" else [tensors.read(name)]:
        assert part.max() == 0
        del part
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


def shards(file: Path) -> None:
    """An index of one shard for each tensor."""
    weight_map = {f"t{i}": f"part-{i}.safetensors" for i in range(PARTS)}
    header = {"dtype": "F32", "shape": [ROWS, COLUMNS], "data_offsets": [0, TENSOR_BYTES]}
    for name, shard in weight_map.items():
        text = json.dumps({name: header}).encode()
        with (file.parent / shard).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + TENSOR_BYTES)
    file.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def legacy_torch(file: Path) -> None:
    tensors = {f"t{i}": torch.zeros(ROWS, COLUMNS) for i in range(PARTS)}
    torch.save(tensors, file, _use_new_zipfile_serialization=False)


def dcp_folder(file: Path) -> None:
    tensors = {f"t{i}": torch.zeros(ROWS, COLUMNS) for i in range(PARTS)}
    dcp.save(tensors, checkpoint_id=file.parent, no_dist=True)


CONTAINERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "safetensors": ("model.safetensors", sparse_safetensors),
    "shards": ("model.safetensors.index.json", shards),
    "torch": ("model.pt", sparse_torch),
    "legacy torch": ("model.pt", legacy_torch),
    "dcp": (".metadata", dcp_folder),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("how", ["read", "blocks"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_reading_all_tensors_holds_one(tmp_path: Path, container: str, how: str) -> None:
    name, write = CONTAINERS[container]
    write(tmp_path / name)
    command = [sys.executable, "-c", READ, str(tmp_path / name), how]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 10 * TENSOR_BYTES
    assert grown < TENSOR_BYTES + SLACK
    assert how == "read" or grown < BLOCK_BYTES + SLACK
