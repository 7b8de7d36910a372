"""`retnet-tools inspect`: what a checkpoint or an exported folder holds, and what looks wrong in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retnet_tools.cli import common


def inspect(
    path: Annotated[
        Path | None,
        typer.Argument(help="Checkpoint or exported folder; the shipped checkpoint if left out.", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", "--no-data", help="Do not read the tensors' data.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with exit code 1 when lint finds an error or a warning.")
    ] = False,
    source_format: Annotated[
        str | None, typer.Option("--from", help="Format of the checkpoint, if it is not to be detected.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show format, configuration, sizes and what each head can remember; look for NaN, rounding and odd settings."""
    from retnet_tools.reports.inspection import inspect_model, inspection_document, open_model, require_clean
    from retnet_tools.reports.inspection_text import render_inspection

    opened = open_model(common.checkpoint_or_default(path), source_format)
    if quick:
        result = inspect_model(opened, None)
    else:
        with common.progress_bar() as progress:
            task = progress.add_task("inspect", total=opened.weight_bytes)
            result = inspect_model(opened, lambda count: progress.advance(task, count))
    common.print_json(inspection_document(result)) if as_json else render_inspection(result)
    if strict:
        require_clean(result)
