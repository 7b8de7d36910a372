"""`retnet-tools convert`: a checkpoint from any format to any that can be written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retnet_tools.cli import options
from retnet_tools.cli.command import command
from retnet_tools.jobs.convert import ConvertRequest


@command(
    ConvertRequest,
    checkpoint=options.CheckpointName,
    output=Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    to=Annotated[str, typer.Option("--to", help="canonical, torchscale, syncdoth or fla.")],
    dtype=Annotated[str | None, typer.Option("--dtype", help="fp32, fp16, bf16 or fp64; as stored if left out.")],
    max_shard_size=Annotated[str, typer.Option("--max-shard-size", help="Bytes in one file, such as 5GB.")],
    **options.HOW_TO_READ,
    force=options.Force,
    dry_run=options.DryRun,
)
def convert(request: ConvertRequest, as_json: options.Json = False) -> None:
    """Write a checkpoint in another format, bit for bit unless its type changes."""
    from retnet_tools.console import print_json, progress_bar
    from retnet_tools.jobs import convert as job
    from retnet_tools.reports.conversion import conversion_document, render_conversion

    with progress_bar() as progress:
        document = conversion_document(job.convert(request, progress))
    print_json(document) if as_json else render_conversion(document)
