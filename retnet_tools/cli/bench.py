"""`retnet-tools bench`: how fast a model decodes on this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from retnet_tools.cli import common


def bench(
    model: Annotated[
        Path | None,
        typer.Argument(help="Exported folder or checkpoint; the shipped one if left out.", show_default=False),
    ] = None,
    device: common.DeviceName = "cpu",
    cpu_fallback: common.CpuFallback = False,
    tokens: Annotated[int, typer.Option("-n", help="Tokens to generate in each sequence.", min=1)] = 128,
    batches: Annotated[str, typer.Option("-b", "--batch", help="Sequences at once; a comma list.")] = "1",
    threads: Annotated[str | None, typer.Option("-t", "--threads", help="CPU threads; a comma list.")] = None,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", help="Times to repeat each.", min=1)] = 5,
    dtype: Annotated[str, typer.Option("--dtype", help="Of a checkpoint's export: fp32, fp16 or bf16.")] = "fp32",
    ops: Annotated[str, typer.Option("--ops", help="Of a checkpoint's export: fused or standard.")] = "fused",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Time decoding, step by step: tokens per second, with their deviation and percentiles."""
    from retnet_tools.dtypes import parse_dtype
    from retnet_tools.formats import open_checkpoint
    from retnet_tools.graph.contract import MANIFEST_FILE
    from retnet_tools.graph.export import plan_export, write_export
    from retnet_tools.reports.benchmark import benchmark_document, measure_decode, render_benchmark
    from retnet_tools.runtime.providers import check_device, parse_device

    target = parse_device(device, cpu_fallback=cpu_fallback)
    number_type = parse_dtype(dtype, ("float32", "float16", "bfloat16"))
    batch_sizes = common.parse_counts("-b", batches)
    thread_counts = [None] if threads is None else common.parse_counts("-t", threads, common.MAX_THREADS)
    if not cpu_fallback:
        check_device(target)
    path = common.checkpoint_or_default(model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = path
        if not (path / MANIFEST_FILE).is_file():
            folder = Path(scratch) / "export"
            plan = plan_export(open_checkpoint(path), dtype=number_type, ops=ops, device=target.kind)
            write_export(plan, folder, force=False, progress=lambda count: None)
        with common.step_progress() as progress:
            rows = measure_decode(
                folder,
                target,
                tokens=tokens,
                batches=batch_sizes,
                threads=thread_counts,
                repetitions=repetitions,
                progress=progress,
            )
    common.print_json(benchmark_document(str(path), rows)) if as_json else render_benchmark(str(path), rows)
