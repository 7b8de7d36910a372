"""The options of a checkpoint to read, which every command that takes one shares."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retnet_tools.errors import UsageError

if TYPE_CHECKING:
    from retnet_tools.formats import CheckpointSource

Format = Annotated[str | None, typer.Option("--from", help="Format of the checkpoint, if it is not to be detected.")]
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Its configuration, where none lies beside the weights."),
]
Entry = Annotated[
    str | None, typer.Option("--entry", metavar="NAME", help="Entry of a torch file with the weights: model_ema, ...")
]
Clamp = Annotated[
    str | None,
    typer.Option("--clamp", metavar="NAME", help="Its parallel form's clamp of scores: abs-of-sum or sum-of-abs."),
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="NAME", help="Branch, tag or commit, of a name on the hub.")
]
IgnoreKey = Annotated[
    list[str] | None,
    typer.Option("--ignore-key", metavar="KEY", help="Configuration key that does not matter; may be repeated."),
]


def checkpoint_source(
    name: str | None,
    format: str | None,
    config: Path | None,
    entry: str | None,
    clamp: str | None,
    revision: str | None,
    ignore_keys: list[str] | None,
) -> CheckpointSource:
    """A checkpoint (or an exported folder) as the options name it, fetched if it lies on the hub.

    Args:
        name: a path or a name on the hub; None takes the checkpoint inside the package, said on stderr.

    Raises:
        UsageError: a clamp that does not exist, a revision of a path.
        InputError: a name on the hub that cannot be had.
    """
    from retnet_tools.formats import CheckpointSource
    from retnet_tools.formats.hub import local_checkpoint
    from retnet_tools.jobs.request import parse_clamp

    kind = None if clamp is None else parse_clamp(clamp)
    if name is None and revision is not None:
        raise UsageError(f"--revision {revision} without a checkpoint", "a name on the hub, such as org/name")
    if name is None:
        raise UsageError("no checkpoint", "a folder, a file, or a name on the hub")
    path = local_checkpoint(name, revision)
    return CheckpointSource(path, format, config, entry, kind, revision, tuple(ignore_keys or ()))
