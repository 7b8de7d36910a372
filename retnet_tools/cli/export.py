"""`retnet-tools export`: a checkpoint to a folder with a stateful ONNX decoder."""

from __future__ import annotations

from retnet_tools.cli import options
from retnet_tools.cli.command import command
from retnet_tools.jobs.export import ExportRequest


@command(ExportRequest, arguments=("checkpoint",))
def export(request: ExportRequest, as_json: options.Json = False) -> None:
    """Write a decoder that takes and returns its states: prefill.onnx and step.onnx, or model.onnx and
    genai_config.json, each with weights.data and retnet.json.
    """
    from retnet_tools.console import print_json, progress_bar
    from retnet_tools.jobs import export as job
    from retnet_tools.reports.export import export_document, render_export

    with progress_bar() as progress:
        result = job.export(request, progress)
    options.say_kept(result.kept)
    print_json(export_document(result)) if as_json else render_export(result)
