"""Prompt speed of an exported model: chunks of several sizes, the step loop, and torch's parallel form.

    python benchmarks/prefill.py --size 1.3b -o benchmarks/prefill_1.3b.json

Exports a random model of a published size to a temporary folder, in float32 and quantized. Every way of reading a
prompt runs in a process of its own, in turns, `--rounds` times: first a prompt of a chunk or two, so that everything is
loaded, then the one that is timed. Figures are medians. Peak memory is ru_maxrss of the process; mapped pages of
weights.data count. The step loop and torch's parallel form read prompts up to `--longest-step` and `--longest-parallel`
tokens; torch makes the logits of every token.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import turns

from retnet_tools.paper import VOCABULARY_SIZE


def reader(way: str, size: str, folder: Path, threads: int) -> Callable[[np.ndarray], None]:
    """What reads a prompt `[T]`: `parallel` (torch), or `KIND/step` or `KIND/chunk size` of an export."""
    if way == "parallel":
        return torch_parallel(size, threads)
    from retnet_tools.runtime.session import DecoderSession

    kind, _, chunk_size = way.partition("/")
    session = DecoderSession(folder / kind, threads=threads)

    def read(prompt: np.ndarray) -> None:
        state = session.new_state()
        if chunk_size == "step":
            for n in range(len(prompt)):
                session.step(prompt[n : n + 1], state, logits=n + 1 == len(prompt))
        else:
            session.prefill([prompt], state, chunk_size=int(chunk_size))

    return read


def torch_parallel(size: str, threads: int) -> Callable[[np.ndarray], None]:
    import torch

    from retnet_tools.model.retention import retention_parallel

    _, model = turns.torch_model(size, threads)

    @torch.inference_mode()
    def read(prompt: np.ndarray) -> None:
        model(torch.from_numpy(prompt[None]), form=retention_parallel)

    return read


def time_one(arguments: argparse.Namespace) -> dict[str, float]:
    """The work of one process: seconds and peak bytes."""
    way, tokens = arguments.time, int(arguments.tokens)
    read = reader(way, arguments.size, arguments.folder, arguments.threads)
    prompt = np.random.default_rng(0).integers(0, VOCABULARY_SIZE, tokens)
    chunk_size = way.rpartition("/")[2]
    read(prompt[: 2 * int(chunk_size) if chunk_size.isdigit() else 64])
    began = time.perf_counter()
    read(prompt)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_resident_bytes": peak}


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All ways in turns, for each prompt length."""
    kinds = ["float32", *filter(None, arguments.quantize.split(","))]
    document = turns.exports(arguments, folder, kinds)
    limits = {f"{kind}/step": arguments.longest_step for kind in kinds} | {"parallel": arguments.longest_parallel}
    ways = [*(f"{kind}/{size}" for kind in kinds for size in arguments.chunk_sizes.split(",")), *limits]
    cases = [(n, way) for n in map(int, arguments.tokens.split(",")) for way in ways if n <= limits.get(way, n)]
    runs = turns.in_turns(arguments, folder, {(n, way): (way, ["--tokens", str(n)]) for n, way in cases})
    return {
        **document,
        "results": [
            {
                "way": way,
                "tokens": tokens,
                "tokens_per_second": round(tokens / statistics.median(run["seconds"] for run in results), 1),
                "seconds": [round(run["seconds"], 3) for run in results],
                "peak_resident_bytes": max(run["peak_resident_bytes"] for run in results),
            }
            for (tokens, way), results in runs.items()
        ],
    }


def main() -> None:
    parser = turns.parser(__doc__ or "", rounds=5)
    parser.add_argument("--tokens", default="512,2048", help="prompt lengths, a comma list")
    parser.add_argument("--chunk-sizes", default="128,256", help="a comma list")
    parser.add_argument("--longest-step", type=int, default=512, help="longest prompt for the step loop")
    parser.add_argument("--longest-parallel", type=int, default=2048, help="longest prompt for torch")
    parser.add_argument("--quantize", default="int8", help="further exports, a comma list of int8 and int4")
    turns.main(parser.parse_args(), time_one, measure)


if __name__ == "__main__":
    main()
