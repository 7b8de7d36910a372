"""The options of calibrated quantization, which `export` and `quantize` share, and its progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retnet_tools.console import print_message, progress_bar
from retnet_tools.jobs.request import parse_size
from retnet_tools.progress import in_megabytes
from retnet_tools.tokenizing import text_files

if TYPE_CHECKING:
    from retnet_tools.graph.export import ExportPlan
    from retnet_tools.quantize.options import QuantizeOptions
    from retnet_tools.quantize.unfinished import Workplace

Calibration = Annotated[
    Path | None,
    typer.Option("--calibration", metavar="FILE", help="Text to learn from, for gptq and for targets."),
]
CalibrationTokens = Annotated[
    int | None, typer.Option("--calibration-tokens", help="Tokens drawn from it (65536 if left out).")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of that draw (0 if left out).", min=0)]
TargetSize = Annotated[
    str | None,
    typer.Option("--target-size", metavar="SIZE", help="Size of weights.data to keep to, such as 5MB, by mixed types."),
]
TargetBits = Annotated[
    float | None, typer.Option("--target-bits", help="The same as bits a weight over all matrices, such as 5.0.")
]
KeepMerged = Annotated[
    bool, typer.Option("--keep-merged", help="With a target: one type for matrices that the graph keeps as one.")
]


def options(
    type: str | None,
    block_size: int | None,
    symmetric: bool | None,
    accuracy_level: int | None,
    method: str | None,
    exclude: list[str] | None,
    tensor_type: list[str] | None,
    calibration: Path | None,
    tokens: int | None,
    seed: int | None,
    target_size: str | None,
    target_bits: float | None,
    keep_merged: bool,
) -> QuantizeOptions | None:
    """What is asked for, as given; None where nothing is.

    Raises:
        UsageError: options that do not go together, or values out of range.
    """
    from retnet_tools.quantize.options import options_of

    return options_of(
        type,
        block_size=block_size,
        symmetric=symmetric,
        accuracy_level=accuracy_level,
        method=method,
        exclude=tuple(exclude or ()),
        tensor_types=tuple(tensor_type or ()),
        calibration=calibration,
        calibration_tokens=tokens,
        seed=seed,
        target_size=None if target_size is None else parse_size(target_size),
        target_bits=target_bits,
        keep_merged=keep_merged,
    )


def run(
    plan: ExportPlan,
    options: QuantizeOptions | None,
    out: Path,
    held_out: text_files.Text | None,
    *,
    force: bool,
    dry_run: bool,
) -> ExportPlan:
    """Plan what is asked for and write it, with progress on stderr; gives back the plan as it was written.

    Args:
        held_out: what quality will be measured on.
    """
    from retnet_tools.graph.export import write_export
    from retnet_tools.quantize.steps import plan_quantized, write_quantized

    unseen = None if held_out is None else held_out.sha256
    with _workplace(out, dry_run=dry_run) as work, progress_bar() as steps:
        if options is not None:
            plan = plan_quantized(plan, options, work=work, progress=steps, unseen=unseen)
        if not dry_run:
            if options is None:
                told = in_megabytes(steps, "write", plan.weight_bytes)
                manifest = write_export(plan, out, force=force, progress=told)
            else:
                manifest = write_quantized(plan, out, force=force, work=work, progress=steps)
            plan = replace(plan, quantization=manifest.quantization)
    return plan


@contextmanager
def _workplace(out: Path, *, dry_run: bool) -> Iterator[Workplace]:
    """A place for results that are worth keeping if a run is stopped, which is said on stderr then.

    Args:
        out: the output that they are for.
        dry_run: they are kept in any case, for the run that writes it.
    """
    from retnet_tools.quantize.unfinished import Workplace, unfinished_folder

    with Workplace(unfinished_folder(out)) as work:
        try:
            yield work
        except BaseException:
            _say_kept(work, "the same command goes on from there")
            raise
        if dry_run:
            _say_kept(work, "the same command without --dry-run goes on from there")


def _say_kept(work: Workplace, what: str) -> None:
    if work.kept:
        print_message(f"what was done is kept in {work.folder}; {what}")
