"""A large random checkpoint, and processes timed beside copying it: shared by the memory benchmarks."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from retnet_tools.config import RetNetConfig
from retnet_tools.formats import Checkpoint
from retnet_tools.formats.canonical import write_canonical
from retnet_tools.graph.export import plan_export, write_export
from retnet_tools.machine import this_machine
from retnet_tools.paper import MODEL_SIZES, VOCABULARY_SIZE
from retnet_tools.quantize.options import QuantizeOptions
from retnet_tools.quantize.steps import plan_quantized, write_quantized
from retnet_tools.random_weights import RandomWeights
from retnet_tools.weights import canonical_shapes

COMMAND = [sys.executable, "-m", "retnet_tools.cli.app"]
Run = tuple[float, int]
Commands = Mapping[str, Sequence[str | Path]]


def random_weights(config: RetNetConfig) -> RandomWeights:
    """Random weights of a model."""
    return RandomWeights(canonical_shapes(config))


def write_checkpoint(folder: Path, size: str, shard_size: int) -> int:
    """Write a random float32 checkpoint of a published size; returns its bytes."""
    config = MODEL_SIZES[size].config(VOCABULARY_SIZE)
    files = write_canonical(folder, config, random_weights(config), max_shard_size=shard_size)
    return sum(file.stat().st_size for file in files)


def write_exports(folder: Path, size: str, ops: str, kinds: Iterable[str]) -> dict[str, int]:
    """Export a random model of a published size to `folder / kind` (float32, float16, int8, int4) where it is not there
    yet; bytes of each."""
    config = MODEL_SIZES[size].config(VOCABULARY_SIZE)
    checkpoint = Checkpoint(Path("random"), "random", config, random_weights(config), [], [], [])
    sizes = {}
    for kind in kinds:
        if (folder / kind).exists():
            pass
        elif kind == "float32" or kind == "float16":
            plan = plan_export(checkpoint, dtype=kind, ops=ops)
            write_export(plan, folder / kind, force=False, progress=lambda count: None)
        else:
            plan = plan_export(checkpoint, dtype="float32", ops=ops)
            write_quantized(plan_quantized(plan, QuantizeOptions(kind)), folder / kind, force=False)
        sizes[kind] = (folder / kind / "weights.data").stat().st_size
    return sizes


# A child starts with its parent's peak as its own, so a small process stands between them.
_LAUNCHER = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(status, usage.ru_maxrss * 1024)
"""


def timed(command: list[str]) -> Run:
    """Seconds until the command is done and its data on the disk, and its peak resident bytes."""
    began = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", _LAUNCHER, *command], stdout=subprocess.PIPE, text=True, check=True)
    status, peak = map(int, result.stdout.split())
    if status:
        sys.exit(f"{' '.join(command)} failed with status {status}")
    os.sync()
    return time.perf_counter() - began, peak


def run_each(commands: Commands, out: Path, after: Callable[[str], None] = lambda name: None) -> dict[str, Run]:
    """Each command once; what it makes is removed again.

    Args:
        commands: after `retnet-tools`, by name; each makes `out`.
        after: called with the name of a command while its output is there.
    """
    runs = {}
    for name, command in commands.items():
        runs[name] = timed([*COMMAND, *map(str, command)])
        after(name)
        _remove(out)
    return runs


def alternate(
    rounds: int,
    copy: Sequence[str | Path],
    commands: Commands,
    out: Path,
    after: Callable[[str], None] = lambda name: None,
) -> tuple[list[Run], dict[str, list[Run]]]:
    """A copy, a command whose last word is what it makes, and `run_each`, in turns."""
    copies: list[Run] = []
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(rounds):
        copies.append(timed([*map(str, copy)]))
        _remove(Path(copy[-1]))
        for name, run in run_each(commands, out, after).items():
            runs[name].append(run)
    return copies, runs


def heading(size: str, nbytes: int, copies: list[Run]) -> dict[str, Any]:
    """How a document on a checkpoint and copies begins."""
    return {
        "size": size,
        "checkpoint_bytes": nbytes,
        "machine": machine(),
        "copy_seconds": [round(seconds, 2) for seconds, _ in copies],
    }


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def summary(runs: list[Run], copies: list[Run]) -> dict[str, Any]:
    """Times, the ratio of their median to that of the copies, and the highest peak."""
    return {
        "seconds": [round(seconds, 2) for seconds, _ in runs],
        "times_copy": round(statistics.median(s for s, _ in runs) / statistics.median(s for s, _ in copies), 2),
        "peak_resident_bytes": max(peak for _, peak in runs),
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    found = this_machine()
    return {"processor": found.processor, "cores": found.cores}


def main(doc: str, measure: Callable[[str, int, Path, list[str]], dict[str, Any]], *, types: str = "fp32,fp16") -> None:
    """The command line of the memory benchmarks."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.3b", choices=sorted(MODEL_SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default=types, help="comma list")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("-o", "--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = measure(arguments.size, arguments.rounds, Path(folder), arguments.dtype.split(","))
    print_document(result, arguments.output)


def print_document(document: dict[str, Any], output: Path | None) -> None:
    """A document on stdout, and in a file if one is named."""
    text = json.dumps(document, indent=1) + "\n"
    print(text, end="")
    if output:
        output.write_text(text)
