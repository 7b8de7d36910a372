"""Steps of exported models against the official torchscale decoder in float32, in turns.

    pip install --no-deps --target torchscale torchscale==0.3.0
    python benchmarks/torchscale_step.py --torchscale torchscale --size 1.3b -o benchmarks/torchscale_step.json

Random weights of a published size; one sequence. Every implementation has a new process in each repetition, which is
`--steps` steps after a warm-up; one that deviates by more than 10% is made again, twice at most, by all. Figures are
medians over repetitions of the median step; ratios are taken in each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from large_checkpoint import write_exports
from record import about, environment
from torchscale_engine import TorchscaleSpec

from retnet_tools.bench.options import BenchOptions, Case
from retnet_tools.bench.rows import off_median
from retnet_tools.bench.specs import RetNetSpec
from retnet_tools.bench.worker import Worker
from retnet_tools.paper import VOCABULARY_SIZE, model_size
from retnet_tools.runtime.providers import Device

OFFICIAL = "torchscale 0.3.0, float32"
KINDS = ("float32", "int8", "int4")
AGAIN = 2


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All implementations in turns."""
    folder.mkdir(parents=True, exist_ok=True)
    write_exports(folder, arguments.size, "fused", KINDS)
    config = model_size(arguments.size).config(VOCABULARY_SIZE)
    chunk_size = BenchOptions().chunk_size
    specs: dict[str, Any] = {OFFICIAL: TorchscaleSpec(config, arguments.threads)}
    specs |= {kind: RetNetSpec(folder / kind, Device("cpu"), arguments.threads, chunk_size) for kind in KINDS}
    test = Case("decode", arguments.steps, arguments.depth, 1)
    medians: dict[str, list[float]] = {name: [] for name in specs}

    def repeat(number: int) -> dict[str, float]:
        with ExitStack() as stack:
            workers = {name: stack.enter_context(Worker(name, spec)) for name, spec in specs.items()}
            order = list(workers)[:: -1 if number % 2 else 1]
            return {name: 1e3 * statistics.median(workers[name].call("run", test).seconds) for name in order}

    def note(number: int, found: dict[str, float]) -> None:
        for name, values in medians.items():
            values[number : number + 1] = [found[name]]

    for number in range(arguments.repetitions):
        note(number, repeat(number))
    again: set[int] = set()
    for _ in range(AGAIN):
        for number in (found := deviating(medians)):
            note(number, repeat(number))
        again |= set(found)
    about = {"size": arguments.size, "threads": arguments.threads, "depth": arguments.depth}
    made_again = [f"repetition {number + 1} of all" for number in sorted(again)]
    return about | {"made_again": made_again, "deviating": deviating(medians), "results": results(medians)}


def deviating(medians: dict[str, list[float]]) -> list[int]:
    """The repetitions in which one differs from the median of its own."""
    return sorted({i for values in medians.values() for i in off_median(values)})


def results(medians: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Of each implementation, with its deviation and how many times as fast as the official one it was."""
    return [
        {
            "implementation": name,
            "ms_per_token": round(statistics.median(found), 2),
            "ms_per_token_std": round(statistics.stdev(found), 2) if len(found) > 1 else None,
            "times_official": round(statistics.median(a / b for a, b in zip(medians[OFFICIAL], found, strict=True)), 2),
            "repetitions_ms": [round(ms, 2) for ms in found],
        }
        for name, found in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torchscale", type=Path, required=True, help="folder that holds the package")
    parser.add_argument("--size", default="1.3b")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=512, help="tokens before the steps, placed")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--exports", type=Path, help="keep the exports here, by size, and take those that are here")
    parser.add_argument("-o", "--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    paths = [str(Path(__file__).parent), str(arguments.torchscale.resolve()), environment()["PYTHONPATH"]]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    record = about("torchscale_step.py")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        began, exports = time.time(), (arguments.exports or Path(folder)) / arguments.size
        found = measure(arguments, exports.resolve())
        text = json.dumps(record | {"seconds": round(time.time() - began)} | found, indent=1) + "\n"
    print(f"torchscale_step.py: {time.time() - began:.0f} s in all", file=sys.stderr)
    print(text, end="")
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
