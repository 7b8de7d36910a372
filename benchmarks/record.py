"""Runs the benchmarks of record and writes what they found, with the machine, to benchmarks/bench/.

    python benchmarks/record.py --device cpu                 all runs for the CPU (make bench)
    python benchmarks/record.py --device cuda                all runs for a GPU (make bench-gpu)
    python benchmarks/record.py --device cpu --only int8     one of them
    python benchmarks/record.py --device cpu --list          what would run

Each run is a `retnet-tools bench` in a process of its own; its command stands in its JSON. Nothing else should run on
the machine. For the CPU, repetitions off by more than 10% are made again before they are recorded, and rows say so;
rows that vary by more than 5% are marked as noisy. All runs for the CPU take about 20 minutes on two cores. Afterwards
`python benchmarks/docs_tables.py` puts the figures into docs/benchmarks.md. Models take up to 12 GB on the disk at a
time for the CPU, and 40 GB for a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "bench"
CONTEXTS = "512,1024,2048,4096,8192,16384,32768"
NOISY = 0.05
"""A deviation of this part of the mean: something else ran on the machine."""


@dataclass(frozen=True)
class Run:
    """One command.

    Attributes:
        options: after `retnet-tools bench`.
    """

    name: str
    options: str


CPU = (
    Run("float32", "--size {size} -p 512 -n 32 -t 2 -r 3 --again 2 --against torch --profile"),
    Run("int8", "--size {size} --quantize int8 -p 512 -n 32 -t 2 -r 3 --again 2 --profile"),
    Run("int4", "--size {size} --quantize int4 --block-size 128 -p 512 -n 32 -t 2 -r 3 --again 2 --profile"),
    Run("flat", "--size {size} --quantize int8 -p 0 -n 32 -t 2 -r 3 --again 2 --flat"),
    Run("flat-float32", "--size {size} -p 0 -n 16 -t 2 -r 3 --again 2 --flat"),
    Run(
        "transformer-prompt",
        "--size {size} --quantize int8 -p 1024 -n 0 -t 2 -r 3 --again 1 --against transformer",
    ),
    Run(
        "context",
        "--size {size} --quantize int8 -p 0 -n 8 -d 512,2048,8192,32768 -b 1,8 -t 2 -r 3 --again 1 "
        "--against transformer,transformer-gqa",
    ),
)
CUDA = (
    Run("float32", "--size {size} -p 512,2048 -n 128 --profile"),
    Run("float16", "--size {size} --dtype fp16 -p 512,2048 -n 128 --profile"),
    Run("float16-eager", "--size {size} --dtype fp16 -p 0 -n 128 --no-cuda-graph"),
    Run("int4", "--size {size} --dtype fp16 --quantize int4 --block-size 128 -p 512,2048 -n 128 --profile"),
    Run("flat", "--size {size} --dtype fp16 -p 0 -n 64 -r 10 --flat"),
    Run("transformer-prompt", "--size 6.7b --dtype fp16 -p 512,2048,8192 -n 0 -r 3 --against transformer"),
    Run(
        "context",
        f"--size 6.7b --dtype fp16 -p 0 -n 16 -d {CONTEXTS} -b 1,2,4,8,16,32,64 -r 3 --against transformer",
    ),
)
RUNS = {"cpu": CPU, "cuda": CUDA}


def record(run: Run, device: str, size: str, folder: Path | None, extra: str) -> bool:
    """Run one command and write its document; False where it failed, which its messages say."""
    options = [*shlex.split(run.options.format(size=size)), *shlex.split(extra)]
    if device != "cpu":
        options += ["--device", device]
    command = ["bench", *options]
    if folder is not None:
        options += ["--folder", str(folder.resolve())]
    kind = device.partition(":")[0]
    began, measured = time.time(), tree()
    process = subprocess.run(
        [sys.executable, "-m", "retnet_tools.cli.app", "bench", *options, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    seconds = time.time() - began
    print(f"{run.name}: exit code {process.returncode} after {seconds:.0f} s", file=sys.stderr)
    if process.returncode:
        return False
    found = json.loads(process.stdout)
    document = {
        "command": shlex.join(["retnet-tools", *command]),
        "recorded": day(began),
        **measured,
        "seconds": round(seconds),
        "noisy": noisy(found["rows"]),
        "made_again": made_again(found["rows"]),
        **found,
    }
    for line in document["noisy"]:
        print(f"{run.name}: noisy: {line}", file=sys.stderr)
    (FOLDER / f"{kind}-{run.name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return True


def environment() -> dict[str, str]:
    """That of this process, where the package of this tree comes first; nothing is kept of models that will be gone."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "RETNET_TOOLS_CACHE": "off"}


def tree() -> dict[str, Any]:
    """The commit of this tree, and whether what is measured differs from it; None outside of a repository."""
    try:
        commit = _git("rev-parse", "HEAD").strip()
        changed = _git("status", "--porcelain", "--", "retnet_tools", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "modified": None}
    return {"commit": commit, "modified": bool(changed)}


def about(script: str) -> dict[str, Any]:
    """The beginning of the record of another script: its command, the day, the tree as it is, and where it runs."""
    from retnet_tools.bench.results import libraries
    from retnet_tools.machine import this_machine

    return {
        "command": shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "recorded": day(time.time()),
        **tree(),
        "libraries": libraries(),
        "machine": asdict(this_machine()),
    }


def day(seconds: float) -> str:
    """The day of a time, in UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def noisy(rows: list[dict[str, Any]]) -> list[str]:
    """The rows whose repetitions deviate by more than `NOISY` of their mean."""
    found = []
    for row in rows:
        part = (row["tokens_per_second_std"] or 0.0) / row["tokens_per_second"]
        if part > NOISY:
            found.append(f"{where(row)}: {part:.1%}")
    return found


def made_again(rows: list[dict[str, Any]]) -> list[str]:
    """The rows with repetitions that were made again, since they deviated."""
    return [f"{where(row)}: {len(numbers)}" for row in rows if (numbers := row.get("made_again"))]


def where(row: dict[str, Any]) -> str:
    """Which row it is."""
    return f"{row['implementation']} {row['test']}, batch {row['batch']}, {row['threads'] or 'all'} threads"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--size", default="1.3b", help="of the runs that are not about 6.7b")
    parser.add_argument("--only", help="names of runs, a comma list")
    parser.add_argument("--folder", type=Path, help="where models are written for the time of a run")
    parser.add_argument("--extra", default="", help="options to add to every command, such as '-r 2'")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    arguments = parser.parse_args()
    runs = RUNS[arguments.device.partition(":")[0]]
    if arguments.only:
        names = arguments.only.split(",")
        if unknown := set(names) - {run.name for run in runs}:
            parser.error(f"no run {', '.join(sorted(unknown))}; there are {', '.join(run.name for run in runs)}")
        runs = tuple(run for run in runs if run.name in names)
    if arguments.list:
        for run in runs:
            print(f"{run.name:<20} retnet-tools bench {run.options.format(size=arguments.size)} {arguments.extra}")
        return
    FOLDER.mkdir(exist_ok=True)
    began = time.time()
    done = [record(run, arguments.device, arguments.size, arguments.folder, arguments.extra) for run in runs]
    print(f"record.py: {time.time() - began:.0f} s in all", file=sys.stderr)
    sys.exit(0 if all(done) else 1)


if __name__ == "__main__":
    main()
