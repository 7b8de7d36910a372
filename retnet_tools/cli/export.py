"""`retnet-tools export`: a checkpoint to a folder with a stateful ONNX decoder."""

from __future__ import annotations

from collections.abc import Callable

from retnet_tools.cli import options
from retnet_tools.cli.command import command
from retnet_tools.errors import RetNetToolsError
from retnet_tools.jobs.export import ExportRequest, ExportResult
from retnet_tools.progress import Progress


@command(ExportRequest, arguments=("checkpoint",))
def export(request: ExportRequest, as_json: options.Json = False) -> None:
    """Write a decoder that takes and returns its states: step.onnx, prefill.onnx and decoder.onnx, or
    model.onnx and genai_config.json, each with weights.data and retnet.json.
    """
    from retnet_tools.jobs import export as job

    show_export(lambda progress: job.export(request, progress), as_json=as_json)


def show_export(run: Callable[[Progress], ExportResult], *, as_json: bool) -> None:
    """Run a job that writes an exported folder, and show its result; that of an error too, whose folder is there."""
    from retnet_tools.console import print_json, progress_bar
    from retnet_tools.reports.export import export_document, render_export

    failed = None
    try:
        with progress_bar() as progress:
            result = run(progress)
    except RetNetToolsError as error:
        if not isinstance(error.result, ExportResult):
            raise
        failed, result = error, error.result
    options.say_kept(result.kept)
    print_json(export_document(result)) if as_json else render_export(result)
    if failed is not None:
        raise failed
