"""`retnet-tools export`: a checkpoint to a folder with a stateful ONNX decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retnet_tools.cli import calibrating, quantizing, source


def export(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint: folder, file or name on the hub; the shipped one if left out.", show_default=False
        ),
    ] = None,
    to: Annotated[str, typer.Option("--to", help="What to write: onnx, or genai for onnxruntime-genai.")] = "onnx",
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Folder to make; <name>-<to> beside the checkpoint, or here from the hub.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Weights and activations: fp32, fp16 or bf16.")] = "fp32",
    state_dtype: Annotated[
        str, typer.Option("--state-dtype", help="Recurrent states between calls: fp32 or fp16 (scaled, within range).")
    ] = "fp32",
    ops: Annotated[
        str, typer.Option("--ops", help="fused (ONNX Runtime's contrib operators) or standard (ai.onnx only).")
    ] = "fused",
    device: Annotated[
        str, typer.Option("--device", help="Whose kernels to build for: cpu or cuda; runs on both.")
    ] = "cpu",
    source_format: source.Format = None,
    config: source.Config = None,
    entry: source.Entry = None,
    clamp: source.Clamp = None,
    revision: source.Revision = None,
    ignore_key: source.IgnoreKey = None,
    quantize: quantizing.Target = None,
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
    """Write a decoder that takes and returns its states: prefill.onnx and step.onnx, or model.onnx and
    genai_config.json, each with weights.data and retnet.json.
    """
    from retnet_tools.console import print_json
    from retnet_tools.dtypes import parse_dtype
    from retnet_tools.graph.export import default_output, plan_export
    from retnet_tools.graph.targets import export_target, target_device
    from retnet_tools.reports.decoding import export_document, export_text

    options = calibrating.options(
        quantize,
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
    target = export_target(to).name
    number_type = parse_dtype(dtype, ("float32", "float16", "bfloat16"))
    state_type = parse_dtype(state_dtype, ("float32", "float16"))
    chosen = source.checkpoint_source(checkpoint, source_format, config, entry, clamp, revision, ignore_key)
    path = chosen.path
    ending = f"{target}{quantizing.ending(options)}" + ("" if target_device(device).name == "cpu" else f"-{device}")
    out = output or (default_output(path, ending) if checkpoint else Path(f"{path.name}-{ending}"))
    if not dry_run:
        quantizing.check_output(out, path, options, force=force)
    plan = plan_export(chosen.open(), dtype=number_type, ops=ops, state_dtype=state_type, target=target, device=device)
    held_out, quality = quantizing.read_text(text, text_tokens, plan, options), None
    plan = calibrating.run(plan, options, out, held_out, force=force, dry_run=dry_run)
    if held_out is not None and not dry_run:
        quality = quantizing.measure(out, chosen, held_out, text_tokens)
    document = export_document(plan, out, written=not dry_run, quality=quality)
    if as_json:
        print_json(document)
    else:
        typer.echo(export_text(document))
