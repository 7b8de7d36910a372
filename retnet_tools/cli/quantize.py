"""`retnet-tools quantize`: an exported folder with smaller weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retnet_tools.cli import calibrating, quantizing


def quantize(
    folder: Annotated[Path, typer.Argument(help="Exported folder with float weights.", show_default=False)],
    target: Annotated[str, typer.Option("--quantize", help=quantizing.TYPES, show_default=False)],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to make; <name>-<type> beside it if left out.")
    ] = None,
    block_size: quantizing.BlockSize = None,
    symmetric: quantizing.Symmetric = None,
    accuracy_level: quantizing.AccuracyLevel = None,
    method: quantizing.MethodName = None,
    exclude: quantizing.Exclude = None,
    tensor_type: quantizing.TensorType = None,
    calibration: calibrating.Calibration = None,
    calibration_tokens: calibrating.CalibrationTokens = None,
    seed: calibrating.Seed = None,
    target_size: calibrating.TargetSize = None,
    target_bits: calibrating.TargetBits = None,
    keep_merged: calibrating.KeepMerged = False,
    text: quantizing.Text = None,
    text_tokens: quantizing.TextTokens = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing export.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write an exported folder again with quantized weights: the same graphs, inputs, outputs and states."""
    from retnet_tools.console import print_json
    from retnet_tools.formats import CheckpointSource
    from retnet_tools.graph.export import default_output, plan_of_export
    from retnet_tools.reports.decoding import export_document, export_text

    options = calibrating.options(
        target,
        block_size,
        symmetric,
        accuracy_level,
        method,
        exclude,
        tensor_type,
        calibration,
        calibration_tokens,
        seed,
        target_size,
        target_bits,
        keep_merged,
    )
    assert options is not None
    out = output or default_output(folder, options.word)
    if not dry_run:
        quantizing.check_output(out, folder, options, force=force)
    plan, quality = plan_of_export(folder), None
    held_out = quantizing.read_text(text, text_tokens, plan, options)
    plan = calibrating.run(plan, options, out, held_out, force=force, dry_run=dry_run)
    if held_out is not None and not dry_run:
        quality = quantizing.measure(out, CheckpointSource(folder), held_out, text_tokens)
    document = export_document(plan, out, written=not dry_run, quality=quality)
    print_json(document) if as_json else typer.echo(export_text(document))
