"""Decode speed of an exported model: in float32 with states in place and in a double buffer, quantized, and torch's
recurrent form.

    python benchmarks/decode.py --size 1.3b -o benchmarks/decode.json

Exports a random model of a published size to a temporary folder. Every way runs in a process of its own, in turns,
`--rounds` times; a round is `--steps` single steps of one sequence after a warm-up. Figures are medians over rounds of
the median step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from large_checkpoint import machine, random_weights, write_exports

from retnet_tools.paper import MODEL_SIZES, VOCABULARY_SIZE

WAYS = ("float32", "float32, double buffer", "int8", "int4", "torch recurrent")
WARM_UP = 5


def stepper(way: str, size: str, folder: Path, threads: int) -> Callable[[np.ndarray], Any]:
    """A function that feeds one token `[1]` to a sequence."""
    if way == "torch recurrent":
        return torch_recurrent(size, threads)
    from retnet_tools.runtime.session import DecoderSession

    kind, _, buffer = way.partition(", ")
    session = DecoderSession(folder / kind, threads=threads, in_place=not buffer)
    state = session.new_state()
    return lambda token: session.step(token, state)


def torch_recurrent(size: str, threads: int) -> Callable[[np.ndarray], Any]:
    import torch

    from retnet_tools.model.retention import retention_recurrent
    from retnet_tools.model.retnet import load_model

    torch.set_num_threads(threads)
    config = MODEL_SIZES[size].config(VOCABULARY_SIZE)
    model = load_model(config, random_weights(config), torch.float32)
    states, position = None, 0

    @torch.inference_mode()
    def step(token: np.ndarray) -> None:
        nonlocal states, position
        output = model(torch.from_numpy(token[None]), form=retention_recurrent, states=states, position=position)
        states, position = output.states, position + 1

    return step


def time_one(arguments: argparse.Namespace) -> None:
    """The work of one process: prints the seconds of each step as JSON."""
    step = stepper(arguments.time, arguments.size, arguments.folder, arguments.threads)
    seconds = []
    for token in np.random.default_rng(0).integers(0, VOCABULARY_SIZE, (WARM_UP + arguments.steps, 1)):
        began = time.perf_counter()
        step(token)
        seconds.append(time.perf_counter() - began)
    print(json.dumps(seconds[WARM_UP:]))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All ways in turns."""
    sizes = write_exports(folder, arguments.size, arguments.ops, ("float32", "int8", "int4"))
    rounds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way, medians in rounds.items():
            command = [sys.executable, __file__, "--size", arguments.size, "--threads", str(arguments.threads)]
            command += ["--time", way, "--steps", str(arguments.steps), "--folder", str(folder)]
            seconds = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            medians.append(statistics.median(seconds))
    float32 = statistics.median(rounds["float32"])
    return {
        "size": arguments.size,
        "ops": arguments.ops,
        "threads": arguments.threads,
        "machine": machine(),
        "weight_bytes": sizes,
        "results": [
            {
                "way": way,
                "ms_per_token": round(1e3 * statistics.median(medians), 2),
                "times_as_fast_as_float32": round(float32 / statistics.median(medians), 2),
                "rounds_ms": [round(1e3 * seconds, 2) for seconds in medians],
            }
            for way, medians in rounds.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.3b", choices=sorted(MODEL_SIZES))
    parser.add_argument("--ops", default="fused", choices=["fused", "standard"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--exports", type=Path, help="a folder to keep the exports in, or that has them already")
    parser.add_argument("-o", "--output", type=Path, help="also write the JSON here")
    parser.add_argument("--time", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.time:
        time_one(arguments)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        text = json.dumps(measure(arguments, arguments.exports or Path(folder)), indent=1) + "\n"
    print(text, end="")
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
