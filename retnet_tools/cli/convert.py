"""`retnet-tools convert`: a checkpoint from any format to any that can be written."""

from __future__ import annotations

from retnet_tools.cli import options
from retnet_tools.cli.command import command
from retnet_tools.jobs.convert import ConvertRequest


@command(ConvertRequest, arguments=("checkpoint", "output"))
def convert(request: ConvertRequest, as_json: options.Json = False) -> None:
    """Write a checkpoint in another format, bit for bit unless its type changes."""
    from retnet_tools.console import print_json, progress_bar
    from retnet_tools.jobs import convert as job
    from retnet_tools.reports.conversion import conversion_document, render_conversion

    with progress_bar() as progress:
        document = conversion_document(job.convert(request, progress))
    print_json(document) if as_json else render_conversion(document)
