"""`retnet-tools perplexity`: how well a model predicts a text, and how far it is from a baseline on it."""

from __future__ import annotations

from dataclasses import replace

from retnet_tools.cli import options
from retnet_tools.cli.command import command
from retnet_tools.jobs.perplexity import PerplexityRequest


@command(
    PerplexityRequest,
    arguments=("checkpoint",),
    text={"flags": "-f --file --text", "rich_help_panel": None},
    context={"flags": "-c --context"},
    max_tokens={"flags": "-n --max-tokens --limit"},
    batch={"flags": "-b --batch"},
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
    print_json(perplexity_document(result)) if as_json else render_perplexity(result.report)
    if plot is not None:
        write_plot(result.report, plot, force=force)
