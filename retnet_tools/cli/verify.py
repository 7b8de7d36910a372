"""`retnet-tools verify`: do the forms of retention agree on a checkpoint, and if not, why."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from retnet_tools.cli import options
from retnet_tools.cli.command import command
from retnet_tools.errors import UsageError
from retnet_tools.jobs.verify import VerifyRequest


@command(
    VerifyRequest,
    arguments=("checkpoint",),
    leave_out=("text",),
    seed={"rich_help_panel": None},
    file={"flags": "-f --file --text"},
)
def verify(
    request: VerifyRequest,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="Run on this text (- reads stdin), not on random tokens.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Compare the forms on the same tokens and say why they differ: rounding, normalisation epsilon or logic.

    Also prefills prefixes in each form and continues them in every other. Ends with exit code 3 when a difference is
    over its budget.
    """
    from retnet_tools.console import print_json, progress_bar
    from retnet_tools.jobs import verify as job
    from retnet_tools.reports.agreement import agreement_document, render_agreement
    from retnet_tools.tokenizing.text_files import read_prompt

    if prompt is not None:
        if request.file is not None:
            raise UsageError("both --prompt and --file", "one of them")
        request = replace(request, text=read_prompt(prompt, None))
    options.say_shipped(request.checkpoint)
    with progress_bar() as progress:
        result = job.verify(request, progress)
    print_json(agreement_document(result)) if as_json else render_agreement(result)
    result.require()
