"""Peak memory and time of exporting a large random checkpoint, against copying the same file.

    python benchmarks/export_memory.py --size 1.3b -o benchmarks/export_memory.json

Writes a checkpoint of random float32 weights in the canonical format to a temporary folder (it needs three times its
size on disk), then alternates `cp` of it and `retnet-tools export` in processes of their own. Peak memory is
ru_maxrss of the export process, which counts mapped file pages too. Times end when the data is on the disk (`sync`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.formats.canonical import write_canonical
from retnet_tools.paper import MODEL_SIZES
from retnet_tools.weights import Array, TensorInfo, canonical_shapes

VOCAB_SIZE = 50257


class RandomWeights:
    """A `WeightSource` that makes each tensor when it is read, from one block of random numbers."""

    def __init__(self, config: RetNetConfig) -> None:
        self._shapes = canonical_shapes(config)
        self._block = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32) * 0.02

    def names(self) -> Iterable[str]:
        return self._shapes

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self._shapes[name], np.dtype(np.float32))

    def read(self, name: str) -> Array:
        return np.resize(self._block, self._shapes[name])


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds until the command is done and its data on the disk, and its peak resident bytes."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed with status {status}")
    os.sync()
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def measure(size: str, rounds: int, folder: Path, dtypes: list[str]) -> dict[str, object]:
    """Alternate copies and exports; medians of the times, maxima of the peaks."""
    config = MODEL_SIZES[size].config(VOCAB_SIZE)
    source = folder / "checkpoint"
    write_canonical(source, config, RandomWeights(config), max_shard_size=1 << 40)
    file = source / "model.safetensors"
    export = [sys.executable, "-m", "retnet_tools.cli.app", "export", str(source), "-o", str(folder / "out"), "--force"]
    copies, exports = [], {dtype: [] for dtype in dtypes}
    for _ in range(rounds):
        copies.append(timed(["cp", str(file), str(folder / "copy")]))
        (folder / "copy").unlink()
        for dtype in dtypes:
            exports[dtype].append(timed([*export, "--dtype", dtype]))
            shutil.rmtree(folder / "out")
    copy_seconds = statistics.median(seconds for seconds, _ in copies)
    return {
        "size": size,
        "checkpoint_bytes": file.stat().st_size,
        "rounds": rounds,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "copy_seconds": [round(seconds, 2) for seconds, _ in copies],
        "exports": {
            dtype: {
                "seconds": [round(seconds, 2) for seconds, _ in runs],
                "times_copy": round(statistics.median(seconds for seconds, _ in runs) / copy_seconds, 2),
                "peak_resident_bytes": max(peak for _, peak in runs),
            }
            for dtype, runs in exports.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.3b", choices=sorted(MODEL_SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="fp32,fp16", help="comma list")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("-o", "--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = measure(arguments.size, arguments.rounds, Path(folder), arguments.dtype.split(","))
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
