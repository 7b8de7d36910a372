"""`retnet-tools quantize`: an exported folder with smaller weights."""

from __future__ import annotations

from retnet_tools.cli import options
from retnet_tools.cli.command import command
from retnet_tools.jobs.quantize import QuantizeRequest


@command(QuantizeRequest, arguments=("folder",))
def quantize(request: QuantizeRequest, as_json: options.Json = False) -> None:
    """Write an exported folder again with quantized weights: the same graphs, inputs, outputs and states."""
    from retnet_tools.console import print_json, progress_bar
    from retnet_tools.jobs import quantize as job
    from retnet_tools.reports.export import export_document, render_export

    with progress_bar() as progress:
        result = job.quantize(request, progress)
    options.say_kept(result.kept)
    print_json(export_document(result)) if as_json else render_export(result)
