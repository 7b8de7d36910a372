"""`retnet-tools perplexity`: how well a model predicts a text, and how far it is from a baseline on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from retnet_tools.cli import options
from retnet_tools.cli.command import command
from retnet_tools.jobs.perplexity import PerplexityRequest


@command(
    PerplexityRequest,
    checkpoint=options.ModelName,
    text=Annotated[Path | None, typer.Option("-f", "--file", "--text", help="File to score; - reads stdin.")],
    against=Annotated[
        str | None,
        typer.Option("--against", help="Baseline: an exported folder, or a checkpoint, run in fp32 on the CPU."),
    ],
    context=Annotated[
        int, typer.Option("-c", "--context", help="Tokens in a row; 0 reads the whole text in one, states carried.")
    ],
    stride=Annotated[
        int | None, typer.Option("--stride", help="Predictions of a row that count, its last; half the context.")
    ],
    max_tokens=Annotated[
        int | None, typer.Option("-n", "--max-tokens", "--limit", help="Take only the first tokens.", min=1)
    ],
    start_token=Annotated[
        str | None, typer.Option("--start-token", help="Token to put before the text, such as '<|endoftext|>'.")
    ],
    token_ids=Annotated[bool, typer.Option("--token-ids", help="The text is token ids.")],
    by_position=Annotated[bool, typer.Option("--by-position", help="Show whether errors grow with the context.")],
    batch=Annotated[int, typer.Option("-b", "--batch", help="Rows fed side by side.", min=1)],
    dtype=Annotated[str, typer.Option("--dtype", help="To run a checkpoint in: fp32, fp16, bf16 or fp64.")],
    **options.HOW_TO_READ,
    device=options.DeviceName,
    cpu_fallback=options.CpuFallback,
    no_cuda_graph=options.NoCudaGraph,
    threads=options.Threads,
)
def perplexity(
    request: PerplexityRequest,
    plot: options.Plot = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Score a text: perplexity and bits per byte, and against a baseline KL divergence and what else differs.

    Names and definitions are those of llama-perplexity. A checkpoint runs in torch, an exported folder without it.
    """
    from retnet_tools.console import print_json, progress_bar
    from retnet_tools.jobs import perplexity as job
    from retnet_tools.plotting import check_plot
    from retnet_tools.reports.perplexity_plot import write_plot
    from retnet_tools.reports.perplexity_text import perplexity_document, render_perplexity

    if plot is not None:
        check_plot(plot, force=force)
        request = replace(request, by_position=True)
    with progress_bar() as progress:
        result = job.perplexity(request, progress)
    if plot is not None:
        write_plot(result.report, plot, force=force)
    print_json(perplexity_document(result)) if as_json else render_perplexity(result.report)
