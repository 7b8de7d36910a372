"""`retnet-tools export`: a checkpoint to a folder with a stateful ONNX decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retnet_tools.cli import options
from retnet_tools.cli.command import command
from retnet_tools.jobs.export import ExportRequest


@command(
    ExportRequest,
    checkpoint=options.CheckpointName,
    output=Annotated[
        Path | None,
        options.writing("-o", "--output", help="Folder to make; <name>-<to> beside the checkpoint, or here."),
    ],
    to=Annotated[str, typer.Option("--to", help="What to write: onnx, or genai for onnxruntime-genai.")],
    dtype=Annotated[str, typer.Option("--dtype", help="Weights and activations: fp32, fp16 or bf16.")],
    state_dtype=Annotated[
        str, typer.Option("--state-dtype", help="Recurrent states between calls: fp32 or fp16 (scaled, within range).")
    ],
    ops=Annotated[
        str, typer.Option("--ops", help="fused (ONNX Runtime's contrib operators) or standard (ai.onnx only).")
    ],
    device=Annotated[str, options.running("--device", help="Whose kernels to build for: cpu or cuda; runs on both.")],
    **options.HOW_TO_READ,
    quantize=options.Quantize,
    **options.HOW_TO_QUANTIZE,
    force=options.Force,
    dry_run=options.DryRun,
)
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
