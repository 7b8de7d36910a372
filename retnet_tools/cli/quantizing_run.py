"""Quantizing with progress on stderr, which `export` and `quantize` share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from retnet_tools.cli import common

if TYPE_CHECKING:
    from retnet_tools.graph.export import ExportPlan
    from retnet_tools.quantize.request import QuantizationRequest


def run_quantization(
    plan: ExportPlan, request: QuantizationRequest, out: Path, *, force: bool, dry_run: bool
) -> ExportPlan:
    """Plan what is asked for and write it, with progress on stderr; gives back the plan."""
    from retnet_tools.quantize.plan import make_method, write_quantized
    from retnet_tools.quantize.request import plan_request

    with _workplace(out, keep=not dry_run) as work:
        with common.step_progress() as steps:
            plan, text = plan_request(plan, request, work=work, progress=steps)
            if dry_run:
                return plan
            method = make_method(plan, text, work=work, progress=steps)
        with common.progress_bar() as progress:
            task = progress.add_task("quantize", total=plan.weight_bytes)
            advance = partial(progress.advance, task)
            write_quantized(plan, out, force=force, progress=advance, method=method)
    return plan


@contextmanager
def _workplace(out: Path, *, keep: bool) -> Iterator[Path]:
    """A folder for results that are worth keeping if a run is stopped, which is said on stderr then.

    Args:
        out: the output that they are for.
        keep: False for a folder that is removed again in any case.
    """
    from retnet_tools.quantize.unfinished import unfinished_folder

    if not keep:
        with TemporaryDirectory() as folder:
            yield Path(folder)
        return
    work = unfinished_folder(out)
    try:
        yield work
    except BaseException:
        if work.is_dir():
            message = f"what was done is kept in {work}; the same command goes on from there"
            common.stderr_console().print(message, highlight=False, soft_wrap=True)
        raise
    shutil.rmtree(work, ignore_errors=True)
