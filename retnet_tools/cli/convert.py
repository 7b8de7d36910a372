"""`retnet-tools convert`: a checkpoint from any format to any that can be written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retnet_tools.cli import common, source


def convert(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint: folder, file or name on the hub.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="canonical, torchscale, syncdoth or fla.")] = "canonical",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="fp32, fp16, bf16 or fp64; as stored if left out.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Bytes in one file, such as 5GB.")] = "5GB",
    source_format: source.Format = None,
    config: source.Config = None,
    entry: source.Entry = None,
    clamp: source.Clamp = None,
    revision: source.Revision = None,
    ignore_key: source.IgnoreKey = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show sizes, names and memory, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a checkpoint in another format, bit for bit unless its type changes."""
    from retnet_tools.dtypes import parse_dtype
    from retnet_tools.formats import writable_format
    from retnet_tools.formats.conversion import plan_checkpoint
    from retnet_tools.formats.writer import check_folder, write_checkpoint
    from retnet_tools.reports.conversion import conversion_document, render_conversion

    target = writable_format(to)
    number_type = None if dtype is None else parse_dtype(dtype)
    size = common.parse_size(max_shard_size)
    opened = source.checkpoint_source(checkpoint, source_format, config, entry, clamp, revision, ignore_key).open()
    plan = plan_checkpoint(opened, target, dtype=number_type, max_shard_size=size)
    if not dry_run:
        check_folder(output, plan.layout, force=force)
        with common.progress_bar() as progress:
            task = progress.add_task("convert", total=plan.layout.nbytes)
            write_checkpoint(output, plan.layout, force=force, progress=lambda count: progress.advance(task, count))
    document = conversion_document(opened, target.name, plan, output, written=not dry_run)
    common.print_json(document) if as_json else render_conversion(document)
