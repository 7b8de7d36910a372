"""The options of `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retnet_tools.cli import common

if TYPE_CHECKING:
    from retnet_tools.bench.options import BenchOptions

Size = Annotated[str | None, typer.Option("--size", help="Random weights of a published size: 300m, 1.3b, 6.7b, ...")]
Prompts = Annotated[
    str | None, typer.Option("-p", help="Prompt lengths to read, a comma list; 0 for none. 512 if left out.")
]
Tokens = Annotated[
    str | None, typer.Option("-n", help="Tokens to generate, a comma list; 0 for none. 128 if left out.")
]
Depths = Annotated[str, typer.Option("-d", "--depth", help="Tokens before those, placed; a comma list.")]
Batches = Annotated[str, typer.Option("-b", "--batch", help="Sequences at once; a comma list.")]
ThreadCounts = Annotated[str | None, typer.Option("-t", "--threads", help="CPU threads; a comma list.")]
Repetitions = Annotated[
    int | None, typer.Option("-r", "--repetitions", help="Times to repeat each; 5 if left out.", min=1)
]
ChunkSize = Annotated[
    int | None,
    typer.Option("--chunk-size", help="Tokens of a prompt that RetNet reads at once; 256 if left out.", min=1),
]
Against = Annotated[
    str | None, typer.Option("--against", help="Alternatives: torch, transformer, transformer-gqa; a comma list.")
]
FloatType = Annotated[str | None, typer.Option("--dtype", help="Of a checkpoint: fp32 (if left out), fp16 or bf16.")]
Operators = Annotated[str | None, typer.Option("--ops", help="Of a checkpoint: fused (if left out) or standard.")]
Flat = Annotated[bool, typer.Option("--flat", help="Decode at positions 1 thousand to 1 million too.")]
Profile = Annotated[bool, typer.Option("--profile", help="Show where a step's time goes, by operator.")]
Plot = Annotated[
    Path | None, typer.Option("--plot", help="Draw the figures: a .png, .svg or .pdf.", show_default=False)
]
Folder = Annotated[
    Path | None, typer.Option("--folder", help="Where models are written for the time of a run.", show_default=False)
]
Eager = Annotated[bool, typer.Option("--no-cuda-graph", help="Launch the kernels of every step one by one on CUDA.")]
Quick = Annotated[bool, typer.Option("--quick", help="-p 64 -n 16 -r 3, and small buffers.")]
Format = Annotated[str, typer.Option("--format", help="table, md, csv or json.")]


def options(
    prompts: str | None,
    tokens: str | None,
    depths: str,
    batches: str,
    threads: str | None,
    repetitions: int | None,
    against: str | None,
    *,
    chunk_size: int | None = None,
    cuda_graph: bool = True,
    quick: bool,
    flat: bool,
) -> BenchOptions:
    """What to measure; what was left out has the value of the whole or the quick run.

    Raises:
        UsageError: a list that is none, or a value that cannot be measured.
    """
    from retnet_tools.bench.options import QUICK, BenchOptions

    default = QUICK if quick else BenchOptions()
    return BenchOptions(
        prompts=default.prompts if prompts is None else tuple(common.parse_numbers("-p", prompts)),
        tokens=default.tokens if tokens is None else tuple(common.parse_numbers("-n", tokens)),
        depths=tuple(common.parse_numbers("-d", depths)),
        batches=tuple(common.parse_counts("-b", batches)),
        threads=(None,) if threads is None else tuple(common.parse_counts("-t", threads, common.MAX_THREADS)),
        repetitions=repetitions or default.repetitions,
        against=() if against is None else tuple(word.strip() for word in against.split(",")),
        chunk_size=chunk_size or default.chunk_size,
        cuda_graph=cuda_graph,
        flat=flat,
        quick=quick,
    )
