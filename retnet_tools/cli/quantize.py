"""`retnet-tools quantize`: an exported folder with smaller weights."""

from __future__ import annotations

from retnet_tools.cli import options
from retnet_tools.cli.command import command
from retnet_tools.cli.export import show_export
from retnet_tools.jobs.quantize import QuantizeRequest


@command(QuantizeRequest, arguments=("folder",))
def quantize(request: QuantizeRequest, as_json: options.Json = False) -> None:
    """Write an exported folder again with quantized weights: the same graphs, inputs, outputs and states."""
    from retnet_tools.jobs import quantize as job

    show_export(lambda progress: job.quantize(request, progress), as_json=as_json)
