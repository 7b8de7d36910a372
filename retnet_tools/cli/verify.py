"""`retnet-tools verify`: do the forms of retention agree, and if not, why; is an export what its checkpoint is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from retnet_tools.cli import options
from retnet_tools.cli.command import command
from retnet_tools.errors import RetNetToolsError, UsageError
from retnet_tools.jobs.verify_request import FORMS_ALONE, VerifyRequest


@command(
    VerifyRequest,
    arguments=("checkpoint",),
    leave_out=("text",),
    seed={"rich_help_panel": None},
    file={"flags": "-f --file --text"},
    against={"metavar": "PATH"},
    budget={"metavar": "FILE"},
)
def verify(
    request: VerifyRequest,
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="Run on this text (- reads stdin), not on random tokens.")
    ] = None,
    junit: Annotated[
        Path | None, options.writing("--junit", metavar="FILE", help="Write the checks as JUnit XML too.")
    ] = None,
    print_budget: Annotated[bool, typer.Option("--print-budget", help="Print the default --budget and end.")] = False,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Compare the forms on the same tokens and say why they differ: rounding, normalisation epsilon or logic.

    Also prefills prefixes in each form and continues them in every other. With --against, or of an exported folder,
    holds that to its checkpoint: its text, every byte of its weights, its graphs. Ends with exit code 3 when something
    is over its budget.
    """
    from retnet_tools.console import print_json, print_message, progress_bar
    from retnet_tools.jobs import verify as job
    from retnet_tools.reports.against import against_document, render_against
    from retnet_tools.reports.agreement import agreement_document, render_agreement
    from retnet_tools.reports.junit import write_junit
    from retnet_tools.staging import check_file
    from retnet_tools.tokenizing.text_files import read_prompt

    if print_budget:
        from retnet_tools.evaluate.budget_file import default_budget_text

        if as_json:
            raise UsageError("--print-budget with --json", "one of them", "a budget is TOML")
        print(default_budget_text(), end="")
        return
    if request.holds_export:
        _refuse_given(context)
    if junit is not None:
        check_file(junit, force=force)
    if prompt is not None:
        if request.file is not None:
            raise UsageError("both --prompt and --file", "one of them")
        request = replace(request, text=read_prompt(prompt, None))
    options.say_shipped(request.checkpoint)
    with progress_bar() as progress:
        result = job.verify(request, progress)
    if isinstance(result, job.VerifyResult):
        print_json(agreement_document(result)) if as_json else render_agreement(result)
    else:
        print_json(against_document(result)) if as_json else render_against(result)
    unwritten: RetNetToolsError | None = None
    if junit is not None:
        try:
            write_junit(result, junit, force=force)
        except RetNetToolsError as error:
            unwritten = error
            print_message(f"the report was not written: {error}")
    result.require()
    if unwritten is not None:
        raise unwritten


def _refuse_given(context: typer.Context) -> None:
    """Refuse options of forms, also at their defaults, where an export is held to its checkpoint."""
    for name in FORMS_ALONE:
        given = context.get_parameter_source(name)
        if given is not None and given.name == "COMMANDLINE":
            found = f"--{name.replace('_', '-')} with an exported folder"
            raise UsageError(found, "a checkpoint alone", "an export has graphs, types and chunks of its own")
