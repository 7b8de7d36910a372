"""`retnet-tools inspect`: what a checkpoint or an exported folder holds, and what looks wrong in it."""

from __future__ import annotations

from typing import Annotated

import typer

from retnet_tools.cli import options
from retnet_tools.cli.command import command
from retnet_tools.jobs.inspect import InspectRequest


@command(InspectRequest, arguments=("checkpoint",), quick={"flags": "--quick --no-data"})
def inspect(
    request: InspectRequest,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with exit code 1 when lint finds an error or a warning.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Show format, configuration, sizes and what each head can remember; look for NaN, rounding and odd settings."""
    from retnet_tools.console import print_json, progress_bar
    from retnet_tools.jobs import inspect as job
    from retnet_tools.reports.inspection import inspection_document, render_inspection

    with progress_bar() as progress:
        result = job.inspect(request, progress)
    print_json(inspection_document(result)) if as_json else render_inspection(result)
    result.require_intact()
    if strict:
        result.require_clean()
