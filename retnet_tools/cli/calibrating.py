"""The options of calibrated quantization, which `export` and `quantize` share, and its progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retnet_tools.console import print_message, progress_bar
from retnet_tools.errors import UsageError
from retnet_tools.jobs.request import parse_size
from retnet_tools.progress import in_megabytes
from retnet_tools.tokenizing import text_files

if TYPE_CHECKING:
    from retnet_tools.graph.export import ExportPlan
    from retnet_tools.graph.quantization import HalfType, WeightType
    from retnet_tools.quantize.request import LearningOptions
    from retnet_tools.quantize.scheme import SchemeOptions
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
    calibration: Path | None,
    tokens: int | None,
    seed: int | None,
    target_size: str | None,
    target_bits: float | None,
    keep_merged: bool,
) -> LearningOptions:
    """What is to be learnt from a text, as given.

    Raises:
        UsageError: options that do not go together, or values out of range.
    """
    from retnet_tools.quantize.budget import Budget
    from retnet_tools.quantize.calibration import CalibrationOptions
    from retnet_tools.quantize.request import LearningOptions

    draw = {name: value for name, value in (("tokens", tokens), ("seed", seed)) if value is not None}
    if calibration is None and draw:
        raise UsageError("--calibration-tokens or --seed without a text", "--calibration FILE")
    text = None if calibration is None else CalibrationOptions(calibration, **draw)
    size = None if target_size is None else parse_size(target_size)
    budget = None if size is None and target_bits is None else Budget(size, target_bits)
    return LearningOptions(text, budget, keep_merged)


def run(
    plan: ExportPlan,
    kind: WeightType | HalfType | None,
    scheme: SchemeOptions,
    learning: LearningOptions,
    out: Path,
    held_out: text_files.Text | None,
    *,
    force: bool,
    dry_run: bool,
) -> ExportPlan:
    """Plan what is asked for and write it, with progress on stderr; gives back the plan as it was written.

    Args:
        held_out: what quality will be measured on.

    Raises:
        UsageError: something to learn without `--quantize`, besides what planning and writing raise.
    """
    from retnet_tools.graph.export import write_export
    from retnet_tools.quantize.plan import make_method, write_quantized
    from retnet_tools.quantize.request import NO_LEARNING, plan_request

    if kind is None and learning != NO_LEARNING:
        raise UsageError("options of a quantization scheme without --quantize", "--quantize int8 or int4")
    learning = replace(learning, unseen=None if held_out is None else held_out.sha256)
    with _workplace(out, dry_run=dry_run) as work:
        method = None
        with progress_bar() as steps:
            if kind is not None:
                plan, text = plan_request(plan, kind, scheme, learning, work=work, progress=steps)
                method = None if dry_run else make_method(plan, text, work=work, progress=steps)
        if not dry_run:
            write = write_export if kind is None else partial(write_quantized, method=method)
            with progress_bar() as progress:
                manifest = write(plan, out, force=force, progress=in_megabytes(progress, "write", plan.weight_bytes))
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
        else:
            work.remove()


def _say_kept(work: Workplace, what: str) -> None:
    if work.kept:
        print_message(f"what was done is kept in {work.folder}; {what}")
