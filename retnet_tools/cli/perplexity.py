"""`retnet-tools perplexity`: how well a model predicts a text, and how far it is from a baseline on it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from retnet_tools.cli import common, source


def perplexity(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Exported folder, or checkpoint (folder, file or name on the hub); the shipped one if left out.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("-f", "--file", "--text", help="File to score; - reads stdin.", show_default=False)
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", help="Baseline: an exported folder, or a checkpoint, run in fp32 on the CPU."),
    ] = None,
    context: Annotated[
        int, typer.Option("-c", "--context", help="Tokens in a row; 0 reads the whole text in one, states carried.")
    ] = 512,
    stride: Annotated[
        int | None, typer.Option("--stride", help="Predictions of a row that count, its last; half the context.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("-n", "--max-tokens", "--limit", help="Take only the first tokens.", min=1)
    ] = None,
    start_token: Annotated[
        str | None, typer.Option("--start-token", help="Token to put before the text, such as '<|endoftext|>'.")
    ] = None,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="The text is token ids.")] = False,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="Show whether errors grow with the context.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw figures by position: a .png, .svg or .pdf.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a plot that is there.")] = False,
    batch: Annotated[int, typer.Option("-b", "--batch", help="Rows fed side by side.", min=1)] = 16,
    dtype: Annotated[str, typer.Option("--dtype", help="To run a checkpoint in: fp32, fp16, bf16, fp64.")] = "fp32",
    source_format: source.Format = None,
    config: source.Config = None,
    entry: source.Entry = None,
    clamp: source.Clamp = None,
    revision: source.Revision = None,
    ignore_key: source.IgnoreKey = None,
    device: Annotated[str, typer.Option("--device", help="Of exports: cpu, cuda or cuda:N.")] = "cpu",
    cpu_fallback: common.CpuFallback = False,
    no_cuda_graph: common.NoCudaGraph = False,
    threads: common.Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Score a text: perplexity and bits per byte, and against a baseline KL divergence and what else differs.

    Names and definitions are those of llama-perplexity. A checkpoint runs in torch, an exported folder without it.
    """
    from retnet_tools.evaluate.logits import is_export
    from retnet_tools.evaluate.perplexity import measure_perplexity
    from retnet_tools.evaluate.scored_text import read_tokens
    from retnet_tools.evaluate.windows import Windows
    from retnet_tools.formats.source import CheckpointSource
    from retnet_tools.plotting import check_plot
    from retnet_tools.reports.perplexity_plot import write_plot
    from retnet_tools.reports.perplexity_text import perplexity_document, render_perplexity

    windows = Windows(context, stride)
    if plot is not None:
        check_plot(plot, force=force)
    content = common.read_text(text).content
    chosen = source.checkpoint_source(model, source_format, config, entry, clamp, revision, ignore_key)
    opened = partial(common.open_logits, cpu_fallback=cpu_fallback, no_cuda_graph=no_cuda_graph)
    scored = opened(chosen, device, threads, dtype)
    baseline = None
    if against is not None:
        other = CheckpointSource.of(against)
        baseline = opened(other, device if is_export(other.path) else "cpu", threads)
    tokens = read_tokens(content, scored, baseline, token_ids=token_ids, start_token=start_token, limit=max_tokens)
    with common.step_progress() as progress:
        report = measure_perplexity(
            scored,
            tokens,
            windows,
            baseline=baseline,
            batch=batch,
            positions=by_position or plot is not None,
            progress=progress,
        )
    if plot is not None:
        write_plot(report, plot, force=force)
    common.print_json(perplexity_document(report)) if as_json else render_perplexity(report)
