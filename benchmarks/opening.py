"""What a process takes to open an export, to its first token and in memory, and what a second one takes beside it.

    python benchmarks/opening.py                     300m and 1.3b in each type
    python benchmarks/opening.py --sizes '' --large 6.7b -o benchmarks/opening_6.7b.json     6.7b in int4, once
    python benchmarks/opening.py --tree ../older     beside an older checkout of this repository, in turns
    python benchmarks/opening.py --quick             a rehearsal, not recorded

Models have random weights. Each tree writes its own exports and runs its own code, in new processes, with the files in
the system's cache, `--rounds` times in turns; figures are medians. A round that deviates by more than 10% from the
median of its figures is made again, twice at most, by all.

Packed weights are kept in a folder of the side's own: `first`, once, opens with that folder empty and fills it; all
else finds them there. Reading is `dd` of weights.data in the same round. The first token is that of `retnet-tools
generate -n 1` from the start of the process to its end. Scoring is `retnet-tools perplexity`, once: a text in one row
(`--context 0`), and in rows of `ROW` side by side. The second process opens, reads and steps while the first, which did
so, is still there: its own memory is the pages that no other process has.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import into_cache
from opening_process import FIRST_TOKENS, VOCABULARY
from record import ROOT, about

from retnet_tools.bench.rows import off_median
from retnet_tools.paper import MODEL_SIZES
from retnet_tools.runtime.packed_weights import VARIABLE as CACHE

OUTPUT = ROOT / "benchmarks" / "opening.json"
BESIDE_OLDER = ROOT / "benchmarks" / "opening_before.json"
KINDS = ("float32", "float16", "int8", "int4")
STEADY = ("opening_seconds", "first_token_seconds", "prompt_tokens_per_second", "ms_per_token")
"""Figures by which a round is judged."""
LEAST_SECONDS = 0.03
"""Below, a difference between two processes says nothing of the machine."""
AGAIN = 2
ROW = 128
"""Tokens in a row of the text that is scored by rows."""
ROWS = 4
"""Of that text."""
QUICK = {"sizes": "base", "large": "", "rounds": 1, "steps": 4, "prompt": 64, "scored": 64}

Reply = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """A tree and one of its exports.

    Attributes:
        name: `now` or `before`.
        tree: that is measured.
        folder: of its exports.
        cache: where it keeps packed weights.
        kind: type of the weights.
    """

    name: str
    tree: Path
    folder: Path
    cache: Path
    kind: str

    @property
    def model(self) -> Path:
        """The export."""
        return self.folder / self.kind

    def environment(self) -> dict[str, str]:
        """Of its processes."""
        return os.environ | {"PYTHONPATH": str(self.tree), CACHE: str(self.cache)}


class Process:
    """One that measures and then waits until the context is left.

    Attributes:
        reply: what it found.
    """

    def __init__(self, side: Side, request: Reply) -> None:
        command = [sys.executable, str(Path(__file__).with_name("opening_process.py")), json.dumps(request)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=side.environment()
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"error: measuring {side.model} of {side.tree} failed with exit code {self._process.wait()}")
        self.reply: Reply = json.loads(line)

    def __enter__(self) -> Reply:
        return self.reply

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


class Measurement:
    """All of one size and type."""

    def __init__(self, arguments: argparse.Namespace, size: str, sides: Sequence[Side]) -> None:
        self._arguments, self._size, self._sides = arguments, size, sides
        self._opened = {"threads": arguments.threads, "prompt": arguments.prompt, "steps": arguments.steps}

    def rows(self, rounds: int, *, scored: int) -> list[dict[str, Any]]:
        """A row for each side."""
        began, made = time.time(), {}
        for side in self._sides:
            request = {"write": side.kind, "size": self._size, "folder": str(side.folder)}
            with Process(side, request) as made[side.name]:
                pass
        written = time.time()
        firsts = {side.name: self._first(side) for side in self._sides}
        found: list[dict[str, Reply]] = [self._round(i) for i in range(rounds)]
        again: set[int] = set()
        for _ in range(AGAIN):
            for i in (deviates := deviating(found)):
                found[i] = self._round(i)
            again |= set(deviates)
        once = {side.name: self._second(side) | self._scoring(side, scored) for side in self._sides}
        print(
            f"{self._size} {self._sides[0].kind}: written in {written - began:.0f} s, "
            f"measured in {time.time() - written:.0f} s",
            file=sys.stderr,
        )
        return [
            {
                "size": self._size,
                "weights": side.kind,
                "tree": side.name,
                "weight_bytes": made[side.name]["weight_bytes"],
                "export_seconds": round(made[side.name]["seconds"], 1),
                **firsts[side.name],
                **summary([replies[side.name] for replies in found]),
                **once[side.name],
                "made_again": sorted(again),
                "deviating": deviating(found),
            }
            for side in self._sides
        ]

    def _round(self, number: int) -> dict[str, Reply]:
        return {side.name: self._once(side) for side in self._sides[:: -1 if number % 2 else 1]}

    def _once(self, side: Side) -> Reply:
        """One round of a side."""
        # Once for the cache of the system.
        reading = [read_seconds(side.model) for _ in range(2)][-1]
        for file in filter(Path.is_file, side.cache.rglob("*")):
            into_cache(file)
        began = time.perf_counter()
        ids = " ".join(map(str, range(1, 1 + FIRST_TOKENS)))
        run_tool(side, "generate", str(side.model), "-p", ids, "--token-ids", "-n", "1", *self._threads(), "-q")
        first_token = time.perf_counter() - began
        with Process(side, self._opened | {"model": str(side.model)}) as reply:
            pass
        times = {"reading_seconds": reading, "first_token_seconds": first_token}
        return reply | times | {"times_reading": reply["opening_seconds"] / reading}

    def _first(self, side: Side) -> Reply:
        """Opening where no packed weights are kept yet."""
        read_seconds(side.model)
        with Process(side, self._opened | {"model": str(side.model), "steps": 1, "prompt": 1}) as first:
            found = {"opening_first_seconds": round(first["opening_seconds"], 4)}
        if side.cache.is_dir():
            # Writing them to the disk would go on beside what is measured next.
            os.sync()
        return found | {"opening_first_peak_bytes": first["peak_resident_bytes"]}

    def _second(self, side: Side) -> Reply:
        """What a second process has of its own while the first is there."""
        request = self._opened | {"model": str(side.model)}
        with Process(side, request), Process(side, request) as second:
            return {"second_own_bytes": second["own_bytes"]}

    def _scoring(self, side: Side, tokens: int) -> Reply:
        """Tokens a second of a text in one row and in rows side by side."""
        if not tokens:
            return {}
        ids = np.random.default_rng(1).integers(0, VOCABULARY, ROWS * ROW)
        text = side.folder / "ids.txt"
        text.write_text(" ".join(map(str, ids)), encoding="ascii")
        ways = {
            "scoring_one_row": ("-c", "0", "-n", str(tokens)),
            "scoring_rows": ("-c", str(ROW), "--stride", str(ROW)),
        }
        found = {}
        for name, options in ways.items():
            shared = (str(side.model), "-f", str(text), "--token-ids", *self._threads(), "--json")
            found[name] = json.loads(run_tool(side, "perplexity", *shared, *options))["tokens_per_second"]
        return found

    def _threads(self) -> tuple[str, ...]:
        return ("-t", str(self._arguments.threads))


def run_tool(side: Side, *arguments: str) -> str:
    """stdout of a command of a side's own; ends the program where it fails, which its messages say."""
    command = [sys.executable, "-m", "retnet_tools.cli.app", *arguments]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=side.environment(), cwd=side.folder)
    if process.returncode:
        sys.exit(f"error: {shlex.join(command)} of {side.tree} ended with exit code {process.returncode}")
    return process.stdout


def read_seconds(model: Path) -> float:
    """Seconds in which `dd` reads weights.data."""
    began = time.perf_counter()
    subprocess.run(
        ["dd", f"if={model / 'weights.data'}", "of=/dev/null", "bs=16M"], check=True, stderr=subprocess.DEVNULL
    )
    return time.perf_counter() - began


def deviating(found: Sequence[dict[str, Reply]]) -> list[int]:
    """The rounds in which a figure of a side differs from its median."""
    rounds: set[int] = set()
    for side in found[0]:
        for name in STEADY:
            least = LEAST_SECONDS if name.endswith("_seconds") else 0.0
            rounds |= set(off_median([replies[side][name] for replies in found], least))
    return sorted(rounds)


def summary(replies: Sequence[Reply]) -> dict[str, Any]:
    """Medians, and the rounds they are of."""
    medians = {name: statistics.median(reply[name] for reply in replies) for name in replies[0]}
    rounded = {name: int(value) if name.endswith("_bytes") else round(value, 4) for name, value in medians.items()}
    return rounded | {"rounds": {name: [round(reply[name], 4) for reply in replies] for name in STEADY}}


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All sizes and types; exports of one are gone before the next are written, where they are not to be kept."""
    trees = {"now": ROOT} | ({"before": arguments.tree.resolve()} if arguments.tree else {})
    work = [
        (size, kind, True) for size in filter(None, arguments.sizes.split(",")) for kind in arguments.kinds.split(",")
    ]
    work += [(arguments.large, "int4", False)] if arguments.large else []
    rows: list[dict[str, Any]] = []
    for size, kind, often in work:
        sides = []
        for name, path in trees.items() if often else [("now", ROOT)]:
            kept = arguments.exports if name == "now" and often else None
            sides.append(Side(name, path, (kept or folder / name).resolve() / size, folder / f"{name}-cache", kind))
            sides[-1].folder.mkdir(parents=True, exist_ok=True)
        measurement = Measurement(arguments, size, sides)
        rows += measurement.rows(arguments.rounds if often else 1, scored=arguments.scored if often else 0)
        for side in sides:
            shutil.rmtree(side.cache, ignore_errors=True)
            if side.folder.is_relative_to(folder):
                shutil.rmtree(side.model)
    about = {"threads": arguments.threads, "prompt": arguments.prompt, "steps": arguments.steps, "row": ROW}
    return about | {"before": commit_of(arguments.tree) if arguments.tree else None, "results": rows}


def commit_of(path: Path) -> str | None:
    """The commit of another tree; None outside of a repository."""
    process = subprocess.run(["git", "rev-parse", "HEAD"], cwd=path, capture_output=True, text=True)
    return process.stdout.strip() or None


def text(document: dict[str, Any]) -> str:
    """The table for people."""
    heading = (
        f"{'':<22} {'read s':>7} {'first s':>8} {'open s':>7} {'token s':>8} {'prompt':>7} {'ms':>7} {'scored/s':>15}"
    )
    lines = [f"{heading} {'peak GB':>8} {'of no file':>10} {'second':>7}"]
    for row in document["results"]:
        scored = " / ".join(f"{row[name]:.0f}" for name in ("scoring_one_row", "scoring_rows") if name in row)
        memory = [row[f"{name}_bytes"] / 1e9 for name in ("peak_resident", "anonymous", "second_own")]
        times = [row[f"{name}_seconds"] for name in ("reading", "opening_first", "opening", "first_token")]
        mark = " deviating" if row["deviating"] else " made again" if row["made_again"] else ""
        lines.append(
            f"{row['size'] + ' ' + row['weights'] + ' ' + row['tree']:<22} {times[0]:>7.2f} {times[1]:>8.2f} "
            f"{times[2]:>7.2f} {times[3]:>8.2f} {row['prompt_tokens_per_second']:>7.0f} {row['ms_per_token']:>7.1f} "
            f"{scored:>15} {memory[0]:>8.2f} {memory[1]:>10.2f} {memory[2]:>7.2f}{mark}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, help="an older checkout to measure beside this one")
    parser.add_argument("--sizes", default="300m,1.3b", help="a comma list")
    parser.add_argument("--kinds", default=",".join(KINDS), help="a comma list")
    parser.add_argument("--large", default="", help="size to measure once in int4")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt that is timed")
    parser.add_argument("--scored", type=int, default=256, help="tokens of the text in one row")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--exports", type=Path, help="keep this tree's exports here, and take those that are here")
    parser.add_argument("-o", "--output", type=Path, help=f"the JSON; {OUTPUT.name} or {BESIDE_OLDER.name}")
    parser.add_argument("--quick", action="store_true", help="a small model for seconds; the JSON only with -o")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    arguments = parser.parse_args()
    if unknown := {*filter(None, arguments.sizes.split(",")), *filter(None, [arguments.large])} - set(MODEL_SIZES):
        parser.error(f"no size {', '.join(sorted(unknown))}; there are {', '.join(MODEL_SIZES)}")
    began, record = time.time(), about("opening.py")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(arguments, Path(folder).resolve())
    document = record | {"seconds": round(time.time() - began)} | found
    print(text(document))
    print(f"opening.py: {time.time() - began:.0f} s in all", file=sys.stderr)
    output = arguments.output or (None if arguments.quick else BESIDE_OLDER if arguments.tree else OUTPUT)
    if output:
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
