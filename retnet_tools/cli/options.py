"""The options that several commands share, each declared once, in the panels of `--help`."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from retnet_tools.console import print_message
from retnet_tools.errors import UsageError
from retnet_tools.graph.quantization import CODE_TYPES, HALF_TYPES

reading = partial(typer.Option, rich_help_panel="Checkpoint")
quantizing = partial(typer.Option, rich_help_panel="Quantization")
calibrating = partial(typer.Option, rich_help_panel="Calibration")
running = partial(typer.Option, rich_help_panel="Device")
writing = partial(typer.Option, rich_help_panel="Output")
CODES, HALVES = " or ".join(CODE_TYPES), " or ".join(HALF_TYPES.values())
BLOCK_SIZES = ", ".join(f"{row.name}: {row.block_size}" for row in CODE_TYPES.values())
MAX_THREADS = max(64, 4 * (os.cpu_count() or 1))
"""More CPU threads than this are a slip of the finger, and would stop the machine."""

CheckpointName = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A folder, a file, or a name on the hub.", show_default=False)
]
CheckpointOrShipped = Annotated[
    str | None,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A folder, a file, or a name on the hub; the shipped one if left out.",
        show_default=False,
    ),
]
ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="An exported folder, or a checkpoint: a folder, a file, or a name on the hub.",
        show_default=False,
    ),
]
Format = Annotated[str | None, reading("--from", help="Its format, if it is not to be detected.")]
Config = Annotated[
    Path | None, reading("--config", metavar="FILE", help="Its configuration, where none lies beside the weights.")
]
Entry = Annotated[
    str | None, reading("--entry", metavar="NAME", help="Entry of a torch file with the weights: model_ema, ...")
]
Clamp = Annotated[
    str | None,
    reading("--clamp", metavar="NAME", help="Its parallel form's clamp of scores: abs-of-sum or sum-of-abs."),
]
Revision = Annotated[
    str | None, reading("--revision", metavar="NAME", help="Branch, tag or commit, of a name on the hub.")
]
IgnoreKey = Annotated[
    list[str] | None,
    reading("--ignore-key", metavar="KEY", help="Configuration key that does not matter; may be repeated."),
]
HOW_TO_READ = {
    "format": Format,
    "config": Config,
    "entry": Entry,
    "clamp": Clamp,
    "revision": Revision,
    "ignore_keys": IgnoreKey,
}

Quantize = Annotated[
    str | None,
    quantizing("--quantize", help=f"{CODES} weights in blocks, or everything but states in {HALVES}."),
]
BlockSize = Annotated[
    int | None,
    quantizing("--block-size", help=f"Weights that share a scale: 32, 64 or 128 ({BLOCK_SIZES} if left out)."),
]
Symmetric = Annotated[
    bool | None,
    quantizing("--symmetric/--asymmetric", help="Without or with a zero point a block; symmetric if left out."),
]
AccuracyLevel = Annotated[
    int | None,
    quantizing(
        "--accuracy-level",
        help="Of products on the CPU: 4 in int8 (if left out), 0 or 1 in float32, which is slow with int8 weights.",
    ),
]
Method = Annotated[
    str | None,
    quantizing(
        "--method", help="How weights are rounded: rtn (to nearest, if left out) or gptq, which learns from a text."
    ),
]
Exclude = Annotated[
    list[str] | None,
    quantizing("--exclude", metavar="REGEX", help="Matrices that stay float, by their names; may be repeated."),
]
TensorType = Annotated[
    list[str] | None,
    quantizing("--tensor-type", metavar="REGEX=TYPE", help=f"{CODES} for some matrices; may be repeated."),
]
QualityText = Annotated[
    Path | None,
    quantizing("--text", help="Measure what it cost on this text, against the float model; kept in the folder."),
]
QualityTokens = Annotated[
    int | None, quantizing("--text-tokens", help="Tokens of --text to use at most.", min=2, show_default=False)
]
Calibration = Annotated[
    Path | None, calibrating("--calibration", metavar="FILE", help="Text to learn from, for gptq and for targets.")
]
CalibrationTokens = Annotated[
    int | None, calibrating("--calibration-tokens", help="Tokens drawn from it (65536 if left out).")
]
CalibrationSeed = Annotated[int | None, calibrating("--seed", help="Seed of that draw (0 if left out).", min=0)]
TargetSize = Annotated[
    str | None,
    calibrating("--target-size", metavar="SIZE", help="Size of weights.data to keep to, such as 5MB, by mixed types."),
]
TargetBits = Annotated[
    float | None, calibrating("--target-bits", help="The same as bits a weight over all matrices, such as 5.0.")
]
KeepMerged = Annotated[
    bool, calibrating("--keep-merged", help="With a target: one type for matrices that the graph keeps as one.")
]
HOW_TO_QUANTIZE = {
    "block_size": BlockSize,
    "symmetric": Symmetric,
    "accuracy_level": AccuracyLevel,
    "method": Method,
    "exclude": Exclude,
    "tensor_types": TensorType,
    "text": QualityText,
    "text_tokens": QualityTokens,
    "calibration": Calibration,
    "calibration_tokens": CalibrationTokens,
    "seed": CalibrationSeed,
    "target_size": TargetSize,
    "target_bits": TargetBits,
    "keep_merged": KeepMerged,
}

DeviceName = Annotated[str, running("--device", help="cpu, cuda or cuda:N.")]
CpuFallback = Annotated[
    bool, running("--allow-cpu-fallback", help="Run on the CPU what cannot run on CUDA, and say so.")
]
NoCudaGraph = Annotated[
    bool, running("--no-cuda-graph", help="Run steps on CUDA kernel by kernel, not as captured graphs.")
]
Threads = Annotated[int | None, running("-t", "--threads", help="CPU threads to use.", min=1, max=MAX_THREADS)]

Prompt = Annotated[
    str | None, typer.Option("-p", "--prompt", help="Prompt; - or none reads stdin.", show_default=False)
]
PromptFile = Annotated[Path | None, typer.Option("-f", "--file", help="Read the prompt from a file.")]
TokenIds = Annotated[bool, typer.Option("--token-ids", help="Token ids in and out, even with a tokenizer.")]
ChunkSize = Annotated[
    int | None, typer.Option("--chunk-size", help="Prompt tokens to run at once.", min=1, show_default=False)
]

Plot = Annotated[Path | None, writing("--plot", help="Draw the figures: a .png, .svg or .pdf.", show_default=False)]
Force = Annotated[bool, writing("--force", help="Replace an output that is there.")]
DryRun = Annotated[bool, writing("--dry-run", help="Say what would be written, and stop.")]
Json = Annotated[bool, writing("--json", help="Print one JSON document.")]


def parse_numbers(option: str, text: str) -> list[int]:
    """Numbers from 0 on from a comma list.

    Raises:
        UsageError: anything else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) < 10 for word in words):
        raise UsageError(f"{option} {text!r}", "whole numbers, separated by commas")
    return [int(word) for word in words]


def parse_counts(option: str, text: str, largest: int | None = None) -> list[int]:
    """Positive numbers from a comma list.

    Raises:
        UsageError: anything else.
    """
    counts = parse_numbers(option, text)
    if min(counts) < 1:
        raise UsageError(f"{option} {text!r}", "positive numbers, separated by commas")
    if largest is not None and max(counts) > largest:
        raise UsageError(f"{option} {max(counts)}", f"at most {largest}")
    return counts


def say_shipped(checkpoint: str | Path) -> None:
    """Say that the checkpoint inside the package is used, where it is."""
    from retnet_tools.jobs.request import shipped_checkpoint

    if checkpoint == shipped_checkpoint():
        print_message(f"no checkpoint named: using the shipped one, {checkpoint}")


def say_kept(folder: Path | None) -> None:
    """Say that a dry run has kept results, where it has."""
    if folder is not None:
        print_message(f"what was done is kept in {folder}; the same command without --dry-run goes on from there")
