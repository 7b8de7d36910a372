"""Time to open a checkpoint of many tensors and list it, and peak memory of reading one, in every container.

    python benchmarks/open_checkpoint.py -o benchmarks/open_checkpoint.json

Opening: `--tensors` small float32 tensors in each container; each run is a process of its own that opens it and asks
for every name, shape and dtype. Seconds are those after the package was imported, and those with its import.
Reading: tensors of 32 MB, read one by one and let go; growth of VmHWM over the largest tensor, and the same for reading
in blocks of rows.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from retnet_tools.machine import this_machine

ROOT = Path(__file__).resolve().parent.parent
State = Mapping[str, torch.Tensor]
RANKS = 8
LARGE_COUNT, LARGE_SHAPE = 8, (2048, 4096)
OPEN = """
import sys, time
start = time.perf_counter()
from pathlib import Path
from retnet_tools.formats.files import CheckpointFiles
imported = time.perf_counter()
tensors = CheckpointFiles(Path(sys.argv[1])).tensors
found = [(name, tensors.info(name)) for name in tensors.names()]
end = time.perf_counter()
print(len(found), end - imported, end - start)
"""
READ = """
import sys
from pathlib import Path
from retnet_tools.formats.files import CheckpointFiles
def peak():
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
tensors = CheckpointFiles(Path(sys.argv[1])).tensors
opened = peak()
largest = 0
for name in tensors.names():
    for part in tensors.blocks(name) if sys.argv[2] == "blocks" else [tensors.read(name)]:
        assert part.size
    del part
print(peak() - opened)
"""


def write_safetensors(folder: Path, state: State) -> None:
    save_file(dict(state), folder / "model.safetensors")


def write_shards(folder: Path, state: State) -> None:
    names = list(state)
    weight_map = {}
    for shard in range(4):
        file = f"model-{shard + 1:05}-of-00004.safetensors"
        part = names[shard::4]
        save_file({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_torch(folder: Path, state: State) -> None:
    torch.save(dict(state), folder / "model.pt")


def write_legacy(folder: Path, state: State) -> None:
    torch.save(dict(state), folder / "model.pt", _use_new_zipfile_serialization=False)


def write_trainer(folder: Path, state: State) -> None:
    """The weights beside AdamW's state, which is three times as many tensors."""
    one = torch.tensor(1.0)
    states = {i: {"step": one, "exp_avg": t.clone(), "exp_avg_sq": t.clone()} for i, t in enumerate(state.values())}
    torch.save({"model": dict(state), "optimizer": {"state": states, "param_groups": []}}, folder / "ckpt.pt")


def write_dcp(folder: Path, state: State, ranks: int = 1) -> None:
    """What torch.distributed.checkpoint writes for tensors whose rows are spread over ranks."""
    described, places = {}, {}
    files = [(folder / f"__{rank}_0.distcp").open("wb") for rank in range(ranks)]
    for name, tensor in state.items():
        chunks, start = [], 0
        for rank, rows in enumerate(torch.chunk(tensor, ranks)):
            offsets = torch.Size((start, *(0 for _ in tensor.shape[1:])))
            at = files[rank].tell()
            torch.save(rows.clone(), files[rank])
            chunks.append(ChunkStorageMetadata(offsets, rows.shape))
            places[MetadataIndex(name, offsets, rank)] = _StorageInfo(f"__{rank}_0.distcp", at, files[rank].tell() - at)
            start += rows.shape[0]
        described[name] = TensorStorageMetadata(TensorProperties.create_from_tensor(tensor), tensor.shape, chunks)
    for file in files:
        file.close()
    paths = {name: ("model", name) for name in state}
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(described, paths, places)))


CONTAINERS: dict[str, Callable[[Path, State], None]] = {
    "safetensors": write_safetensors,
    "safetensors, 4 shards": write_shards,
    "torch": write_torch,
    "torch, beside AdamW's state": write_trainer,
    "torch before 1.6": write_legacy,
    "DCP": write_dcp,
    f"DCP, {RANKS} ranks": lambda folder, state: write_dcp(folder, state, RANKS),
}


def run(code: str, *arguments: str | Path) -> list[float]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return list(map(float, result.stdout.split()))


def opening(folder: Path, count: int, runs: int) -> dict[str, Any]:
    times = [run(OPEN, folder) for _ in range(runs)]
    assert all(listed == count for listed, _, _ in times)
    return {
        "open_seconds": round(statistics.median(t for _, t, _ in times), 3),
        "open_seconds_slowest": round(max(t for _, t, _ in times), 3),
        "open_seconds_with_import": round(statistics.median(t for _, _, t in times), 3),
    }


def reading(folder: Path, nbytes: int) -> dict[str, Any]:
    grown = {how: int(run(READ, folder, how)[0]) for how in ("read", "blocks")}
    return {
        **{f"{how}_peak_bytes": peak for how, peak in grown.items()},
        "read_peak_over_largest": round(grown["read"] / nbytes, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="where to write the document; it is printed in any case")
    arguments = parser.parse_args()
    names = [f"model.layers.{i // 10}.block.part{i % 10}.weight" for i in range(arguments.tensors)]
    small = {name: torch.randn(16, 4) for name in names}
    large = {f"model.layers.{i}.weight": torch.randn(LARGE_SHAPE) for i in range(LARGE_COUNT)}
    nbytes = 4 * LARGE_SHAPE[0] * LARGE_SHAPE[1]
    found: dict[str, Any] = {}
    for container, write in CONTAINERS.items():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), small)
            found[container] = opening(Path(folder), len(small), arguments.runs)
            shutil.rmtree(folder)
            Path(folder).mkdir()
            write(Path(folder), large)
            found[container] |= reading(Path(folder), nbytes)
        print(container, found[container], file=sys.stderr)
    document = {
        "tensors": len(small),
        "largest_tensor_bytes": nbytes,
        "machine": asdict(this_machine()),
        "containers": found,
    }
    text = json.dumps(document, indent=1) + "\n"
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
