"""Decode speed of an exported model: in float32 with states in place and in a double buffer, quantized, and torch's
recurrent form.

    python benchmarks/decode.py --size 1.3b -o benchmarks/decode.json

Exports a random model of a published size to a temporary folder. Every way runs in a process of its own, in turns,
`--rounds` times; a round is `--steps` single steps of one sequence after a warm-up. Figures are medians over rounds of
the median step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import turns

from retnet_tools.paper import VOCABULARY_SIZE

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

    _, model = turns.torch_model(size, threads)
    states, position = None, 0

    @torch.inference_mode()
    def step(token: np.ndarray) -> None:
        nonlocal states, position
        output = model(torch.from_numpy(token[None]), form=retention_recurrent, states=states, position=position)
        states, position = output.states, position + 1

    return step


def time_one(arguments: argparse.Namespace) -> list[float]:
    """The work of one process: the seconds of each step."""
    step = stepper(arguments.time, arguments.size, arguments.folder, arguments.threads)
    seconds = []
    for token in np.random.default_rng(0).integers(0, VOCABULARY_SIZE, (WARM_UP + arguments.steps, 1)):
        began = time.perf_counter()
        step(token)
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP:]


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All ways in turns."""
    document = turns.exports(arguments, folder, ("float32", "int8", "int4"))
    runs = turns.in_turns(arguments, folder, {way: (way, ["--steps", str(arguments.steps)]) for way in WAYS})
    rounds = {way: [statistics.median(seconds) for seconds in found] for way, found in runs.items()}
    float32 = statistics.median(rounds["float32"])
    return {
        **document,
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
    parser = turns.parser(__doc__ or "", rounds=3)
    parser.add_argument("--steps", type=int, default=40)
    turns.main(parser.parse_args(), time_one, measure)


if __name__ == "__main__":
    main()
