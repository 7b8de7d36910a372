"""Retention of a prompt: by chunks of matrix products (Eq. 7), and by LinearAttention, which walks token by token.

    python benchmarks/retention_prompt.py --device cuda -o benchmarks/gpu/retention-prompt.json

What `export --device cuda` takes for prompts is chunks; the operator is what it leaves, in the form that runs at these
heads (`retnet_tools.graph.cuda_ops.tokens_form`). A graph holds `--layers` of it, as `benchmarks/retention.py`
has it; times are of a whole prompt in one layer, chunk after chunk: medians over `--rounds`. `speedup` is against the
operator.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from retention import HEADS, Stack, microseconds, split, write_rows

from retnet_tools.graph.cuda_ops import tokens_form
from retnet_tools.graph.decay import StepDecay, chunk_decay
from retnet_tools.graph.nodes import GraphBuilder
from retnet_tools.graph.ops import StandardOps
from retnet_tools.runtime.providers import Device, check_device, parse_device


def chunk(g: GraphBuilder, q: ir.Value, k: ir.Value, v: ir.Value, past: ir.Value, decay: StepDecay) -> Any:
    """All tokens of the graph as one chunk without padding; ONNX Runtime makes the same powers of gamma once."""
    assert decay.position_ids.shape is not None
    tokens = g.constant("tokens", np.array(decay.position_ids.shape[1], dtype=np.int64))
    first = g.op("Gather", decay.position_ids, g.integers(0), axis=1)  # [B, T] -> [B, 1]
    start = g.op("Sub", first, first)
    terms = chunk_decay(g, decay.log_gamma, tokens, start, g.op("Add", start, tokens))
    return StandardOps().retention_chunk(g, q, k, v, past, terms)


def rows(heads: tuple[int, int, int], arguments: argparse.Namespace, device: Device) -> list[dict[str, Any]]:
    """The operator first, then chunks of each size."""
    _, k, v = heads
    form = tokens_form(k, v)
    ways = [(f"chunks of {size}", chunk, size) for size in arguments.chunk_sizes]
    if form.kernel is not None:
        ways.insert(0, (f"operator, keys in {form.key_splits}", split(form.key_splits), arguments.tokens))
    found: list[dict[str, Any]] = []
    for name, make, tokens in ways:
        row: dict[str, Any] = dict(zip(("heads", "k", "v"), heads, strict=True)) | {"form": name}
        try:
            stack = Stack(make, arguments.layers, *heads, tokens)
            calls = arguments.tokens // tokens
            row["us"] = calls * microseconds(stack, 1, device, arguments.steps, arguments.rounds, captured=False)
            if form.kernel is not None and "us" in (found or [row])[0]:
                row["speedup"] = (found or [row])[0]["us"] / row["us"]
        except Exception as error:
            row["failed"] = " ".join(str(error).split())[-200:]
        found.append(row)
        print(json.dumps(row), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--heads", default=",".join("x".join(map(str, heads)) for heads in HEADS[:4]))
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt; each chunk size divides it")
    parser.add_argument("--chunk-sizes", default="128,256,512,1024")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    arguments.chunk_sizes = [int(size) for size in arguments.chunk_sizes.split(",")]
    if any(arguments.tokens % size for size in arguments.chunk_sizes):
        parser.error(f"--chunk-sizes that do not divide {arguments.tokens}")
    device = parse_device(arguments.device)
    check_device(device)
    found = []
    for text in arguments.heads.split(","):
        heads, k, v = map(int, text.split("x"))
        found += rows((heads, k, v), arguments, device)
    write_rows(arguments.output, device, found, tokens=arguments.tokens)


if __name__ == "__main__":
    main()
