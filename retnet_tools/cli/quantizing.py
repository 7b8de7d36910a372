"""The options of quantization, which `export` and `quantize` share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retnet_tools.errors import UsageError
from retnet_tools.graph.quantization import CODE_TYPES, HALF_TYPES
from retnet_tools.tokenizing import text_files

if TYPE_CHECKING:
    from retnet_tools.formats import CheckpointSource
    from retnet_tools.graph.export import ExportPlan
    from retnet_tools.graph.quantization import Quality
    from retnet_tools.quantize.options import QuantizeOptions

_CODES, _HALVES = " or ".join(CODE_TYPES), " or ".join(HALF_TYPES.values())
TYPES = f"{', '.join(CODE_TYPES)} (weights in blocks), {_HALVES}."
_SIZES = ", ".join(f"{row.name}: {row.block_size}" for row in CODE_TYPES.values())

Target = Annotated[
    str | None,
    typer.Option("--quantize", help=f"Weights in blocks of {_CODES}, or everything but states in {_HALVES}."),
]
BlockSize = Annotated[
    int | None,
    typer.Option("--block-size", help=f"Weights that share a scale: 32, 64 or 128 ({_SIZES} if left out)."),
]
Symmetric = Annotated[
    bool | None,
    typer.Option("--symmetric/--asymmetric", help="Without or with a zero point a block; symmetric if left out."),
]
AccuracyLevel = Annotated[
    int | None,
    typer.Option(
        "--accuracy-level",
        help="Of products on the CPU: 4 in int8 (if left out), 0 or 1 in float32, which is slow with int8 weights.",
    ),
]
MethodName = Annotated[
    str | None,
    typer.Option("--method", help="How weights are rounded: rtn (to nearest) or gptq, which learns from a text."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="REGEX", help="Matrices that stay float, by their names; may be repeated."),
]
TensorType = Annotated[
    list[str] | None,
    typer.Option("--tensor-type", metavar="REGEX=TYPE", help=f"{_CODES} for some matrices; may be repeated."),
]

Text = Annotated[
    Path | None,
    typer.Option("--text", help="Measure what it cost on this text, against the float model; kept in the folder."),
]
TextTokens = Annotated[
    int | None, typer.Option("--text-tokens", help="Tokens of --text to use at most.", min=2, show_default=False)
]


def check_output(out: Path, source: Path, options: QuantizeOptions | None, *, force: bool) -> None:
    """Check that an output may be written, and that it is not its own source.

    Raises:
        UsageError, OutputError: it may not.
    """
    from retnet_tools.graph.contract import MANIFEST_FILE
    from retnet_tools.quantize.card import check_card
    from retnet_tools.staging import check_target

    check_target(out, marker=MANIFEST_FILE, force=force, source=source)
    if options is not None:
        check_card(out)


def read_text(
    file: Path | None, limit: int | None, plan: ExportPlan, options: QuantizeOptions | None
) -> text_files.Text | None:
    """The text to measure on, if there is one, and if what is planned can be measured on it.

    Raises:
        UsageError: a limit without a text, besides what `check_measurable` raises.
        InputError: a text that cannot be read.
    """
    from retnet_tools.evaluate.quality import check_measurable

    if file is None:
        if limit is not None:
            raise UsageError("--text-tokens without a text", "--text FILE")
        return None
    text = text_files.read_text(file)
    check_measurable(plan, None if options is None else options.type, text, limit)
    return text


def measure(folder: Path, baseline: CheckpointSource, text: text_files.Text, limit: int | None) -> Quality:
    """Measure a quantized folder against its float parent, with a progress bar."""
    from retnet_tools.console import progress_bar
    from retnet_tools.evaluate.quality import measure_quality
    from retnet_tools.jobs.perplexity import open_logits
    from retnet_tools.runtime.providers import parse_device

    parent = open_logits(baseline, parse_device("cpu"))
    with progress_bar() as progress:
        return measure_quality(folder, parent, text, limit=limit, progress=progress)


def ending(options: QuantizeOptions | None) -> str:
    """What the name of a quantized folder ends with."""
    return "" if options is None else f"-{options.word}"
