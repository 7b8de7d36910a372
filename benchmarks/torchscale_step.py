"""Steps of exported models against the official torchscale decoder in float32, in turns.

    pip install --no-deps --target torchscale torchscale==0.3.0
    python benchmarks/torchscale_step.py --torchscale torchscale --size 1.3b -o benchmarks/torchscale_step.json

Random weights of a published size; one sequence. Every implementation has a process of its own, and each repetition is
`--steps` steps after a warm-up. Figures are medians over repetitions of the median step; times are by repetition.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from large_checkpoint import machine, write_exports
from torchscale_engine import TorchscaleSpec

from retnet_tools.paper import VOCABULARY_SIZE, model_size
from retnet_tools.reports.benchmark.options import BenchOptions, Case
from retnet_tools.reports.benchmark.specs import RetNetSpec
from retnet_tools.reports.benchmark.worker import Worker
from retnet_tools.runtime.providers import Device

OFFICIAL = "torchscale 0.3.0, float32"
KINDS = ("float32", "int8", "int4")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All implementations in turns."""
    write_exports(folder, arguments.size, "fused", KINDS)
    config = model_size(arguments.size).config(VOCABULARY_SIZE)
    chunk_size = BenchOptions().chunk_size
    specs: dict[str, Any] = {OFFICIAL: TorchscaleSpec(config, arguments.threads)}
    specs |= {kind: RetNetSpec(folder / kind, Device("cpu"), arguments.threads, chunk_size) for kind in KINDS}
    test = Case("decode", arguments.steps, arguments.depth, 1)
    medians: dict[str, list[float]] = {name: [] for name in specs}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, spec)) for name, spec in specs.items()}
        for repetition in range(arguments.repetitions):
            for name in list(workers)[:: -1 if repetition % 2 else 1]:
                medians[name].append(1e3 * statistics.median(workers[name].call("run", test).seconds))
    return {
        "size": arguments.size,
        "threads": arguments.threads,
        "depth": arguments.depth,
        "machine": machine(),
        "results": [
            {
                "implementation": name,
                "ms_per_token": round(statistics.median(found), 2),
                "times_official": round(
                    statistics.median(a / b for a, b in zip(medians[OFFICIAL], found, strict=True)), 2
                ),
                "repetitions_ms": [round(ms, 2) for ms in found],
            }
            for name, found in medians.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torchscale", type=Path, required=True, help="folder that holds the package")
    parser.add_argument("--size", default="1.3b")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=512, help="tokens before the steps, placed")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("-o", "--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    paths = [str(Path(__file__).parent), str(arguments.torchscale.resolve()), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        text = json.dumps(measure(arguments, Path(folder)), indent=1) + "\n"
    print(text, end="")
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
