"""`retnet-tools quantize`: an exported folder with smaller weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retnet_tools.cli import common, quantizing
from retnet_tools.cli.quantizing_run import run_quantization


def quantize(
    folder: Annotated[Path, typer.Argument(help="Exported folder with float weights.", show_default=False)],
    target: Annotated[
        str, typer.Option("--quantize", help="int8, int4 (weights in blocks), fp16 or bf16.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to make; <name>-<type> beside it if left out.")
    ] = None,
    block_size: quantizing.BlockSize = None,
    symmetric: quantizing.Symmetric = None,
    accuracy_level: quantizing.AccuracyLevel = None,
    method: quantizing.MethodName = None,
    exclude: quantizing.Exclude = None,
    tensor_type: quantizing.TensorType = None,
    calibration: quantizing.Calibration = None,
    calibration_tokens: quantizing.CalibrationTokens = None,
    seed: quantizing.Seed = None,
    target_size: quantizing.TargetSize = None,
    target_bits: quantizing.TargetBits = None,
    keep_merged: quantizing.KeepMerged = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing export.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write an exported folder again with quantized weights: the same graphs, inputs, outputs and states."""
    from retnet_tools.graph.contract import MANIFEST_FILE
    from retnet_tools.graph.export import default_output
    from retnet_tools.graph.exported import plan_of_export
    from retnet_tools.reports.decoding import export_document, export_text
    from retnet_tools.staging import check_target

    request = quantizing.request(
        target,
        block_size=block_size,
        symmetric=symmetric,
        accuracy_level=accuracy_level,
        method=method,
        exclude=exclude,
        tensor_type=tensor_type,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        seed=seed,
        target_size=target_size,
        target_bits=target_bits,
        keep_merged=keep_merged,
    )
    assert request is not None
    out = output or default_output(folder, quantizing.ending(request)[1:])
    if not dry_run:
        check_target(out, marker=MANIFEST_FILE, force=force)
    plan = run_quantization(plan_of_export(folder), request, out, force=force, dry_run=dry_run)
    document = export_document(plan, out, written=not dry_run)
    common.print_json(document) if as_json else typer.echo(export_text(document))
