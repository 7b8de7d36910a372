"""`retnet-tools bench`: how fast a model reads and decodes on this machine, against its limit and alternatives."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from retnet_tools.cli import benching, common, quantizing, source


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Exported folder, or checkpoint (folder, file or name on the hub); the shipped one if left out.",
            show_default=False,
        ),
    ] = None,
    size: benching.Size = None,
    device: common.DeviceName = "cpu",
    cpu_fallback: common.CpuFallback = False,
    prompts: benching.Prompts = None,
    tokens: benching.Tokens = None,
    depths: benching.Depths = "0",
    batches: benching.Batches = "1",
    threads: benching.ThreadCounts = None,
    repetitions: benching.Repetitions = None,
    chunk_size: benching.ChunkSize = None,
    against: benching.Against = None,
    dtype: benching.FloatType = None,
    ops: benching.Operators = None,
    quantize: quantizing.Target = None,
    block_size: quantizing.BlockSize = None,
    accuracy_level: quantizing.AccuracyLevel = None,
    source_format: source.Format = None,
    config: source.Config = None,
    entry: source.Entry = None,
    clamp: source.Clamp = None,
    revision: source.Revision = None,
    ignore_key: source.IgnoreKey = None,
    eager: benching.Eager = False,
    flat: benching.Flat = False,
    profile: benching.Profile = False,
    plot: benching.Plot = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a plot that is there.")] = False,
    folder: benching.Folder = None,
    quick: benching.Quick = False,
    output: benching.Format = "table",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Time prompts and decoding as llama-bench does: tokens a second, latency and memory, beside the share of what
    memory and processor allow.

    A model that is no export yet is written to a temporary folder first.
    """
    from retnet_tools.bench.models import ModelOptions, make_model
    from retnet_tools.bench.plot import write_plot
    from retnet_tools.bench.profile import measure_profile
    from retnet_tools.bench.results import benchmark_document
    from retnet_tools.bench.run import run_benchmark
    from retnet_tools.bench.text import comma_separated, markdown, parse_format, render_benchmark
    from retnet_tools.dtypes import parse_dtype
    from retnet_tools.errors import UsageError
    from retnet_tools.plotting import check_plot
    from retnet_tools.runtime.providers import parse_device, usable_device

    target, form = parse_device(device, cpu_fallback=cpu_fallback), "json" if as_json else parse_format(output)
    lists = (prompts, tokens, depths, batches, threads, repetitions, against)
    options = benching.options(*lists, chunk_size=chunk_size, cuda_graph=not eager, quick=quick, flat=flat)
    if plot is not None:
        check_plot(plot, force=force)
    number_type = None if dtype is None else parse_dtype(dtype, ("float32", "float16", "bfloat16"))
    scheme = quantizing.options(block_size, None, accuracy_level, None, None, None)
    how = (source_format, config, entry, clamp, revision, ignore_key)
    if size is not None and (model is not None or any(how)):
        raise UsageError(f"--size {size} and a checkpoint or options of one", "one of them")
    origin = source.checkpoint_source(model, *how) if size is None else None
    chosen = ModelOptions(origin, size, number_type, quantize, ops, scheme, target.kind)
    target = usable_device(target)
    if folder is not None and not folder.is_dir():
        raise UsageError(f"no folder {folder}", "--folder with one that exists")
    with tempfile.TemporaryDirectory(prefix="retnet-tools-", dir=folder) as name, common.step_progress() as progress:
        scratch = Path(name)
        measured = make_model(chosen, scratch, progress, copies=options.copies)
        report = run_benchmark(measured, options, target, scratch, progress)
        if flat:
            from retnet_tools.bench.flat import measure_flat

            report = dataclasses.replace(report, flat=measure_flat(measured, options, target, progress))
        if profile:
            report = dataclasses.replace(report, profile=measure_profile(measured, options, target, scratch))
    if form == "json":
        common.print_json(benchmark_document(report))
    elif form == "table":
        render_benchmark(report)
    else:
        typer.echo(markdown(report) if form == "md" else comma_separated(report))
    if plot is not None:
        write_plot(report, plot, force=force)
