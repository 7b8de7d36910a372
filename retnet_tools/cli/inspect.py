"""`retnet-tools inspect`: what a checkpoint or an exported folder holds, and what looks wrong in it."""

from __future__ import annotations

from typing import Annotated

import typer

from retnet_tools.cli import common, source


def inspect(
    path: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint (folder, file or name on the hub) or exported folder; the shipped one if left out.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", "--no-data", help="Do not read the tensors' data.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with exit code 1 when lint finds an error or a warning.")
    ] = False,
    source_format: source.Format = None,
    config: source.Config = None,
    entry: source.Entry = None,
    clamp: source.Clamp = None,
    revision: source.Revision = None,
    ignore_key: source.IgnoreKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show format, configuration, sizes and what each head can remember; look for NaN, rounding and odd settings."""
    from retnet_tools.reports.inspection import inspect_model, inspection_document, open_model, require_clean
    from retnet_tools.reports.inspection_text import render_inspection

    opened = open_model(source.checkpoint_source(path, source_format, config, entry, clamp, revision, ignore_key))
    if quick:
        result = inspect_model(opened, None)
    else:
        with common.progress_bar() as progress:
            task = progress.add_task("inspect", total=opened.weight_bytes)
            result = inspect_model(opened, lambda count: progress.advance(task, count))
    common.print_json(inspection_document(result)) if as_json else render_inspection(result)
    if strict:
        require_clean(result)
