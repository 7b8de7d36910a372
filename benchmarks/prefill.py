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
import json
import resource
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
    from retnet_tools.model.retnet import load_model

    torch.set_num_threads(threads)
    config = MODEL_SIZES[size].config(VOCABULARY_SIZE)
    model = load_model(config, random_weights(config), torch.float32)

    @torch.inference_mode()
    def read(prompt: np.ndarray) -> None:
        model(torch.from_numpy(prompt[None]), form=retention_parallel)

    return read


def time_one(way: str, size: str, folder: Path, threads: int, tokens: int) -> None:
    """The work of one process: prints seconds and peak bytes as JSON."""
    read = reader(way, size, folder, threads)
    prompt = np.random.default_rng(0).integers(0, VOCABULARY_SIZE, tokens)
    chunk_size = way.rpartition("/")[2]
    read(prompt[: 2 * int(chunk_size) if chunk_size.isdigit() else 64])
    began = time.perf_counter()
    read(prompt)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_resident_bytes": peak}))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All ways in turns, for each prompt length."""
    kinds = ["float32", *filter(None, arguments.quantize.split(","))]
    sizes = write_exports(folder, arguments.size, arguments.ops, kinds)
    limits = {f"{kind}/step": arguments.longest_step for kind in kinds} | {"parallel": arguments.longest_parallel}
    ways = [*(f"{kind}/{size}" for kind in kinds for size in arguments.chunk_sizes.split(",")), *limits]
    cases = [(n, way) for n in map(int, arguments.tokens.split(",")) for way in ways if n <= limits.get(way, n)]
    runs: dict[tuple[int, str], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(arguments.rounds):
        for (tokens, way), results in runs.items():
            command = [sys.executable, __file__, "--size", arguments.size, "--threads", str(arguments.threads)]
            command += ["--time", way, "--tokens", str(tokens), "--folder", str(folder)]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return {
        "size": arguments.size,
        "ops": arguments.ops,
        "threads": arguments.threads,
        "machine": machine(),
        "weight_bytes": sizes,
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.3b", choices=sorted(MODEL_SIZES))
    parser.add_argument("--tokens", default="512,2048", help="prompt lengths, a comma list")
    parser.add_argument("--chunk-sizes", default="128,256", help="a comma list")
    parser.add_argument("--longest-step", type=int, default=512, help="longest prompt for the step loop")
    parser.add_argument("--longest-parallel", type=int, default=2048, help="longest prompt for torch")
    parser.add_argument("--quantize", default="int8", help="further exports, a comma list of int8 and int4")
    parser.add_argument("--ops", default="fused", choices=["fused", "standard"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--exports", type=Path, help="a folder to keep the exports in, or that has them already")
    parser.add_argument("-o", "--output", type=Path, help="also write the JSON here")
    parser.add_argument("--time", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.time:
        time_one(arguments.time, arguments.size, arguments.folder, arguments.threads, int(arguments.tokens))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        text = json.dumps(measure(arguments, arguments.exports or Path(folder)), indent=1) + "\n"
    print(text, end="")
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
