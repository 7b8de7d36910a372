"""Speed and memory beside llama.cpp: RetNet in int8 and int4, and a Llama with as many parameters in q8_0 and q4_0.

    make out/llama-cpp          compiles llama-cpp-python there, a quarter of an hour
    python benchmarks/llama_cpp.py --llama-python out/llama-cpp/bin/python
    python benchmarks/llama_cpp.py --llama-python out/llama-cpp/bin/python --quick     a rehearsal, not recorded

Both have random weights, the same width, depth, vocabulary and threads. For a prompt, and for decoding one sequence at
each depth, RetNet and llama.cpp take turns, each time in a new process, with the files in the system's cache; contexts
are placed, not read (`llama_engine.py` says how, and why attention reads all of it). llama.cpp has room for that
context, in its default type of cache, float16, and its binding's default kernel of attention. A repetition that
deviates by more than 10% from its median is made once more, by both, and marked. Figures are medians over repetitions,
ratios are taken in each.

`opening` is of `DecoderSession`, which finds its packed weights kept but for the very first time, and of `Llama`, which
also reads a vocabulary; imports do not count. Memory in use is the most that was resident while measuring, mapped
weights included.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from large_checkpoint import write_exports
from llama_engine import measured
from record import ROOT, about, environment

from retnet_tools.bench.engines import RetNetEngine
from retnet_tools.bench.options import WARM_UP_STEPS, BenchOptions, Case
from retnet_tools.bench.rows import off_median
from retnet_tools.bench.specs import RetNetSpec
from retnet_tools.bench.transformer_graph import matching_transformer, parameters, transformer_shapes
from retnet_tools.paper import MODEL_SIZES, VOCABULARY_SIZE
from retnet_tools.runtime.packed_weights import VARIABLE as CACHE
from retnet_tools.runtime.providers import Device
from retnet_tools.weights import canonical_shapes

PAIRS = {"int8": "q8_0", "int4": "q4_0"}
SIDES = ("retnet", "llama.cpp")
GGUF_BLOCK = 32
"""Rows of a quantized matrix are whole blocks."""
CELLS = 256
"""llama.cpp makes its cache a multiple of these."""
OUTPUT = ROOT / "benchmarks" / "llama_cpp.json"
QUICK = {"size": "base", "prompt": 64, "tokens": 4, "depths": "0,128,320", "repetitions": 1}
_VERSIONS = """
import json, sys
from importlib.metadata import version
import gguf, llama_cpp
print(json.dumps({"llama_cpp_python": llama_cpp.__version__, "gguf": version("gguf")}))
"""

Reply = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """What is measured of a pair.

    Attributes:
        python: with llama.cpp.
        folder: with an export `int8` and a file `q8_0.gguf`, and so on.
    """

    python: Path
    folder: Path
    threads: int
    flash_attention: bool

    def run(self, side: str, weights: str, test: Case) -> Reply:
        """One repetition on one side, in a new process."""
        request = asdict(test) | {"threads": self.threads, "room": test.room, "warm_up": WARM_UP_STEPS}
        if side == "retnet":
            files = [*(self.folder / weights).iterdir(), *filter(Path.is_file, (self.folder / "packed").rglob("*"))]
            command: list[str | Path] = [sys.executable, Path(__file__), "--time"]
            request |= {"model": str(self.folder / weights)}
        else:
            files = [self.folder / f"{weights}.gguf"]
            command = their_command(self.python)
            request |= {"method": "measure", "model": str(files[0]), "flash_attention": self.flash_attention}
            request |= {"kept": str(self.folder / f"{weights}.kept")}
        for file in files:
            into_cache(file)
        return reply(command, request)

    def compare(self, pair: tuple[str, str], tests: Sequence[Case], repetitions: int) -> list[dict[str, Any]]:
        """All tests of a pair, in turns."""
        found: dict[Case, list[dict[str, Reply]]] = {test: [] for test in tests}
        for repetition in range(repetitions):
            for test in tests:
                found[test].append(self._both(pair, test, repetition))
        rows = []
        for test, replies in found.items():
            again = deviating(replies)
            for repetition in again:
                replies[repetition] = self._both(pair, test, repetition)
            rows.append(row(pair, test, replies, again))
        return rows

    def _both(self, pair: tuple[str, str], test: Case, repetition: int) -> dict[str, Reply]:
        order = [*zip(SIDES, pair, strict=True)][:: -1 if repetition % 2 else 1]
        found = {side: self.run(side, weights, test) for side, weights in order}
        speeds = ", ".join(f"{side} {1e3 * found[side]['seconds']:.1f} ms" for side in SIDES)
        print(f"{' / '.join(pair)} {test.name}, repetition {repetition + 1}: {speeds}", file=sys.stderr)
        return found


def their_command(python: Path) -> list[str | Path]:
    return [python, "-P", Path(__file__).with_name("llama_engine.py")]


def reply(command: Sequence[str | Path], request: dict[str, Any]) -> Reply:
    """What a process answers; ends the program where it fails, which its messages say."""
    kept = {CACHE: str(Path(request["model"]).parent / "packed")}
    command = [*command, json.dumps(request)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment() | kept)
    if code := process.returncode:
        ending = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}, see above"
        sys.exit(f"error: {command[0]} ended with {ending}, measuring {Path(request['model']).name}")
    found: Reply = json.loads(process.stdout)
    return found


def into_cache(file: Path) -> None:
    """Read a file through, so that the system has it in memory."""
    with file.open("rb", buffering=0) as stream:
        while stream.read(1 << 24):
            pass


def time_ours(request: dict[str, Any]) -> Reply:
    """The work of one of our processes."""
    prompts, chunk_size = request["kind"] == "prefill", BenchOptions().chunk_size
    spec = RetNetSpec(Path(request["model"]), Device("cpu"), request["threads"], chunk_size, prompts)
    return measured(lambda: RetNetEngine(spec), request)


def deviating(replies: Sequence[dict[str, Reply]]) -> list[int]:
    """The repetitions in which the seconds of a side differ from their median."""
    return sorted({i for side in SIDES for i in off_median([both[side]["seconds"] for both in replies])})


def row(pair: tuple[str, str], test: Case, replies: Sequence[dict[str, Reply]], again: list[int]) -> dict[str, Any]:
    """The figures of a test; `again` are the repetitions that were made once more."""
    ratios = [both["llama.cpp"]["seconds"] / both["retnet"]["seconds"] for both in replies]
    return {
        "test": test.name,
        "depth": test.depth,
        **{
            side: {"weights": weights, **summary(test, [both[side] for both in replies])}
            for side, weights in zip(SIDES, pair, strict=True)
        },
        "times_as_fast": round(statistics.median(ratios), 2),
        "made_again": again,
        "deviating": deviating(replies),
    }


def summary(test: Case, replies: Sequence[Reply]) -> dict[str, Any]:
    """Medians of one side."""
    tokens = test.tokens if test.kind == "prefill" else 1
    ms = [1e3 * found["seconds"] / tokens for found in replies]
    memory = ("peak_resident_bytes", "private_bytes")
    return {
        "tokens_per_second": round(1e3 / statistics.median(ms), 2),
        "ms_per_token": round(statistics.median(ms), 3),
        **{
            name: round(statistics.median(f[name] for f in replies), 3) for name in ("opening_seconds", "first_seconds")
        },
        **{name: None if replies[0][name] is None else statistics.median(f[name] for f in replies) for name in memory},
        "repetitions_ms": [round(value, 3) for value in ms],
    }


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write what is not in the folder yet, and measure all pairs."""
    config = MODEL_SIZES[arguments.size].config(VOCABULARY_SIZE)
    depths = [int(depth) for depth in arguments.depths.split(",")]
    tests = [Case("prefill", arguments.prompt, 0, 1)]
    tests += [Case("decode", arguments.tokens, depth, 1) for depth in depths]
    positions = math.ceil(max(test.room for test in tests) / CELLS) * CELLS
    transformer = matching_transformer(config, max_positions=positions)
    transformer = replace(transformer, ffn_dim=round(transformer.ffn_dim / GGUF_BLOCK) * GGUF_BLOCK)
    shapes = transformer_shapes(transformer)
    counts = {"retnet": parameters(canonical_shapes(config)), "llama.cpp": parameters(shapes)}
    print(f"parameters: {counts['retnet']:,} of RetNet, {counts['llama.cpp']:,} of the Llama", file=sys.stderr)
    files = write_exports(folder, arguments.size, "fused", PAIRS)
    for kind in PAIRS.values():
        path = folder / f"{kind}.gguf"
        # Of another prompt, perhaps.
        path.with_suffix(".kept").unlink(missing_ok=True)
        if not path.exists():
            request = {"method": "write", "model": str(path), "type": kind, "config": asdict(transformer)}
            reply(their_command(arguments.llama_python), request | {"shapes": shapes})
        files[kind] = path.stat().st_size
    comparison = Comparison(arguments.llama_python, folder, arguments.threads, arguments.flash_attention)
    return {
        "size": arguments.size,
        "threads": arguments.threads,
        "parameters": counts,
        "weight_bytes": files,
        "cache": "float16",
        "flash_attention": arguments.flash_attention,
        "results": [row for pair in PAIRS.items() for row in comparison.compare(pair, tests, arguments.repetitions)],
    }


def text(document: dict[str, Any]) -> str:
    """The table for people."""
    lines = [f"{'':<28} {'tokens/s':>18} {'times':>6} {'GB in use':>14} {'of no file':>14} {'opening, s':>14}"]
    for found in document["results"]:
        ours, theirs = (found[side] for side in SIDES)
        sides = (ours, theirs)
        speed = " / ".join(f"{side['tokens_per_second']:.1f}" for side in sides)
        memory = [" / ".join(gb(side[name]) for side in sides) for name in ("peak_resident_bytes", "private_bytes")]
        opening = " / ".join(f"{side['opening_seconds']:.2f}" for side in sides)
        name = f"{ours['weights']} / {theirs['weights']} {found['test']}"
        mark = " deviating" if found["deviating"] else " made again" if found["made_again"] else ""
        cells = f"{speed:>18} {found['times_as_fast']:>6.2f} {memory[0]:>14} {memory[1]:>14} {opening:>14}"
        lines.append(f"{name:<28} {cells}{mark}")
    return "\n".join(lines)


def gb(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e9:.2f}"


def versions(python: Path) -> dict[str, str]:
    """Those of llama.cpp's packages; ends the program where they cannot be imported."""
    try:
        process = subprocess.run([python, "-P", "-c", _VERSIONS], capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"error: {python} does not run ({error.strerror}); name an interpreter that has llama-cpp-python")
    if process.returncode:
        reason = (process.stderr.splitlines() or ["no message"])[-1]
        sys.exit(
            f"error: {python} cannot import llama_cpp and gguf ({reason}); "
            "make out/llama-cpp, then --llama-python out/llama-cpp/bin/python"
        )
    found: dict[str, str] = json.loads(process.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(sys.executable)
    parser.add_argument("--llama-python", type=Path, default=here, help="interpreter with llama-cpp-python and gguf")
    parser.add_argument("--size", default="1.3b", choices=sorted(MODEL_SIZES))
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=8, help="tokens to decode at each depth")
    parser.add_argument("--depths", default="0,2048,8192,32768", help="tokens before, a comma list")
    parser.add_argument("--flash-attention", action="store_true", help="of llama.cpp; off is its binding's default")
    parser.add_argument("--folder", type=Path, help="keep the models here, and take those that are here")
    parser.add_argument("-o", "--output", type=Path, help=f"the JSON; {OUTPUT.name} beside this script")
    parser.add_argument("--quick", action="store_true", help="a small model for seconds; the JSON only with -o")
    parser.add_argument("--time", metavar="REQUEST", help=argparse.SUPPRESS)
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    arguments = parser.parse_args()
    if arguments.time:
        print(json.dumps(time_ours(json.loads(arguments.time))))
        return
    # Not resolved: the interpreter of a virtual environment is a link.
    arguments.llama_python = Path(os.path.abspath(arguments.llama_python))
    began, packages, record = time.time(), versions(arguments.llama_python), about("llama_cpp.py")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve() / arguments.size
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(arguments, folder)
    record["libraries"] |= packages
    document = record | {"seconds": round(time.time() - began)} | found
    print(text(document))
    print(f"llama_cpp.py: {time.time() - began:.0f} s in all", file=sys.stderr)
    output = arguments.output or (None if arguments.quick else OUTPUT)
    if output:
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
