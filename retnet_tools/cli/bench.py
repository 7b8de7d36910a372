"""`retnet-tools bench`: how fast a model reads and decodes on this machine, against its limit and alternatives."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retnet_tools.cli import options
from retnet_tools.cli.command import MAX_THREADS, SETTINGS, command
from retnet_tools.jobs.request import CheckpointOrShipped

if TYPE_CHECKING:
    from retnet_tools.bench.options import BenchOptions

_model, _tests, _quantization, _device, _output = (
    partial(typer.Option, rich_help_panel=panel) for panel in ("Model", "Tests", "Quantization", "Device", "Output")
)

Size = Annotated[
    str | None, _model("--size", metavar="SIZE", help="Random weights of a published size: 300m, 1.3b, 6.7b, ...")
]
Prompts = Annotated[str | None, _tests("-p", help="Prompt lengths to read, a comma list; 0 for none. 512 if left out.")]
Tokens = Annotated[str | None, _tests("-n", help="Tokens to generate, a comma list; 0 for none. 128 if left out.")]
Depths = Annotated[str, _tests("-d", "--depth", help="Tokens before those, placed; a comma list.")]
Batches = Annotated[str, _tests("-b", "--batch", help="Sequences at once; a comma list.")]
ThreadCounts = Annotated[str | None, _tests("-t", "--threads", help="CPU threads; a comma list.")]
Repetitions = Annotated[int | None, _tests("-r", "--repetitions", help="Times to repeat each; 5 if left out.", min=1)]
Again = Annotated[
    int, _tests("--again", metavar="N", help="Make a repetition off by over 10% again, N times at most.", min=0)
]
Against = Annotated[
    str | None, _tests("--against", help="Alternatives: torch, transformer, transformer-gqa; a comma list.")
]
FloatType = Annotated[
    str | None, _model("--dtype", metavar="fp32|fp16|bf16", help="Of a checkpoint: fp32 (if left out), fp16 or bf16.")
]
Operators = Annotated[
    str | None, _model("--ops", metavar="fused|standard", help="Of a checkpoint: fused (if left out) or standard.")
]
Quantize = Annotated[str | None, _quantization("--quantize", **SETTINGS["quantize"])]
BlockSize = Annotated[int | None, _quantization("--block-size", **SETTINGS["block_size"])]
AccuracyLevel = Annotated[
    int | None, _quantization("--accuracy-level", help="Of products on the CPU: 4 in int8, 0 or 1 in float32.")
]
Flat = Annotated[bool, _tests("--flat", help="Decode at positions 1 thousand to 1 million too.")]
Profile = Annotated[bool, _tests("--profile", help="Show where a step's time goes, by operator.")]
Folder = Annotated[
    Path | None, _output("--folder", help="Where models are written for the time of a run.", show_default=False)
]
Quick = Annotated[bool, _tests("--quick", help="-p 64 -n 16 -r 3, and small buffers.")]
Format = Annotated[str, _output("--format", metavar="table|md|csv|json", help="table, md, csv or json.")]


@command(CheckpointOrShipped, arguments=("checkpoint",))
def bench(
    request: CheckpointOrShipped,
    size: Size = None,
    device: options.DeviceName = "cpu",
    cpu_fallback: options.CpuFallback = False,
    prompts: Prompts = None,
    tokens: Tokens = None,
    depths: Depths = "0",
    batches: Batches = "1",
    threads: ThreadCounts = None,
    repetitions: Repetitions = None,
    again: Again = 0,
    chunk_size: options.ChunkSize = None,
    against: Against = None,
    dtype: FloatType = None,
    ops: Operators = None,
    quantize: Quantize = None,
    block_size: BlockSize = None,
    accuracy_level: AccuracyLevel = None,
    eager: options.NoCudaGraph = False,
    flat: Flat = False,
    profile: Profile = False,
    plot: options.Plot = None,
    force: options.Force = False,
    folder: Folder = None,
    quick: Quick = False,
    output: Format = "table",
    as_json: options.Json = False,
) -> None:
    """Time prompts and decoding as llama-bench does: tokens a second, latency and memory, beside the share of what
    memory and processor allow.

    A model that is no export yet is written to a temporary folder first.
    """
    from retnet_tools.bench.models import ModelOptions, make_model
    from retnet_tools.bench.plot import write_bench_plot
    from retnet_tools.bench.profile import measure_profile
    from retnet_tools.bench.results import benchmark_document
    from retnet_tools.bench.run import run_benchmark
    from retnet_tools.bench.text import comma_separated, markdown, parse_format, render_benchmark
    from retnet_tools.console import print_json, progress_bar
    from retnet_tools.dtypes import parse_dtype
    from retnet_tools.errors import UsageError
    from retnet_tools.plotting import check_plot
    from retnet_tools.quantize.options import options_of
    from retnet_tools.runtime.providers import parse_device, usable_device

    target, form = parse_device(device, cpu_fallback=cpu_fallback), "json" if as_json else parse_format(output)
    lists = (prompts, tokens, depths, batches, threads, repetitions, against)
    asked = bench_options(*lists, chunk_size=chunk_size, cuda_graph=not eager, quick=quick, flat=flat, again=again)
    if plot is not None:
        check_plot(plot, force=force)
    number_type = None if dtype is None else parse_dtype(dtype, ("float32", "float16", "bfloat16"))
    how_small = options_of(quantize, block_size=block_size, accuracy_level=accuracy_level)
    if size is not None and request != CheckpointOrShipped():
        raise UsageError(f"--size {size} and a checkpoint or options of one", "one of them")
    origin = None if size is not None else request.source()
    if origin is not None:
        options.say_shipped(request.checkpoint)
    chosen = ModelOptions(origin, size, number_type, how_small, ops, target.kind)
    target = usable_device(target)
    if folder is not None and not folder.is_dir():
        raise UsageError(f"no folder {folder}", "--folder with one that exists")
    with tempfile.TemporaryDirectory(prefix="retnet-tools-", dir=folder) as name, progress_bar() as progress:
        scratch = Path(name)
        measured = make_model(chosen, scratch, progress, copies=asked.copies)
        report = run_benchmark(measured, asked, target, scratch, progress)
        if flat:
            from retnet_tools.bench.flat import measure_flat

            report = dataclasses.replace(report, flat=measure_flat(measured, asked, target, progress))
        if profile:
            report = dataclasses.replace(report, profile=measure_profile(measured, asked, target, scratch))
    if form == "json":
        print_json(benchmark_document(report))
    elif form == "table":
        render_benchmark(report)
    else:
        typer.echo(markdown(report) if form == "md" else comma_separated(report))
    if plot is not None:
        write_bench_plot(report, plot, force=force)


def bench_options(
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
    again: int = 0,
) -> BenchOptions:
    """What to measure; what was left out has the value of the whole or the quick run.

    Raises:
        UsageError: a list that is none, or a value that cannot be measured.
    """
    from retnet_tools.bench.options import QUICK, BenchOptions

    default = QUICK if quick else BenchOptions()
    return BenchOptions(
        prompts=default.prompts if prompts is None else tuple(options.parse_numbers("-p", prompts)),
        tokens=default.tokens if tokens is None else tuple(options.parse_numbers("-n", tokens)),
        depths=tuple(options.parse_numbers("-d", depths)),
        batches=tuple(options.parse_counts("-b", batches)),
        threads=(None,) if threads is None else tuple(options.parse_counts("-t", threads, MAX_THREADS)),
        repetitions=repetitions or default.repetitions,
        against=() if against is None else tuple(word.strip() for word in against.split(",")),
        chunk_size=chunk_size or default.chunk_size,
        cuda_graph=cuda_graph,
        flat=flat,
        quick=quick,
        again=again,
    )
