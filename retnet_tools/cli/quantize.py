"""`retnet-tools quantize`: an exported folder with smaller weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retnet_tools.cli import common, quantizing


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
    text: quantizing.Text = None,
    text_tokens: quantizing.TextTokens = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing export.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write an exported folder again with quantized weights: the same graphs, inputs, outputs and states."""
    from retnet_tools.graph.contract import MANIFEST_FILE
    from retnet_tools.graph.export import default_output
    from retnet_tools.graph.exported import plan_of_export
    from retnet_tools.quantize.plan import plan_target, write_quantized
    from retnet_tools.quantize.scheme import TARGET_WORDS, parse_target
    from retnet_tools.reports.decoding import export_document, export_text
    from retnet_tools.reports.quality import check_measurable
    from retnet_tools.staging import check_target

    options = quantizing.options(block_size, symmetric, accuracy_level, method, exclude, tensor_type)
    kind = parse_target(target)
    out = output or default_output(folder, TARGET_WORDS[kind])
    if not dry_run:
        check_target(out, marker=MANIFEST_FILE, force=force)
    plan, quality = plan_target(plan_of_export(folder), kind, options), None
    content = common.read_text(text) if text else ""
    if text is not None:
        check_measurable(plan)
    if not dry_run:
        with common.progress_bar() as progress:
            task = progress.add_task("quantize", total=plan.weight_bytes)
            write_quantized(plan, out, force=force, progress=lambda count: progress.advance(task, count))
    if text is not None and not dry_run:
        quality = quantizing.measure(out, folder, text, content, text_tokens)
    document = export_document(plan, out, written=not dry_run, quality=quality)
    common.print_json(document) if as_json else typer.echo(export_text(document))
