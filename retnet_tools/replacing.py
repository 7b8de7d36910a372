"""The files of a folder in place of those of another, so that a run that is stopped half-way is finished by the next.

They are made ready in `.<name>.ready` inside the folder, with a plan beside them. Then the old marker goes first, files
move in one by one, and the new marker comes last: without it a folder is no output.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

from retnet_tools.disk import hidden_path, remove_path, sync
from retnet_tools.errors import InputError, OutputError
from retnet_tools.inputs import load_json, part_path

_PLAN = ".plan.json"


def is_being_replaced(folder: Path) -> bool:
    """Whether a run was stopped while it replaced the files of a folder; the next one goes on with that."""
    return (hidden_path(folder.resolve(), "ready", folder) / _PLAN).is_file()


def check_names(folder: Path, names: Collection[str]) -> None:
    """Check that names are of files of a folder, or of none.

    Raises:
        OutputError: one leads elsewhere, or is a folder.
    """
    for name in names:
        if part_path(folder, name) is None or (folder / name).is_dir():
            raise OutputError(f"{folder / name} is not a file of {folder}", "one to replace", "remove it yourself")


def replace_files(partial: Path, target: Path, marker: str, stale: Collection[str]) -> None:
    """Put the files of a folder in it into another, in place of those of the same names, and remove stale ones.

    Raises:
        OutputError: as `check_names`; nothing is changed then.
    """
    check_names(target, [*(file.name for file in partial.iterdir()), *stale])
    (partial / _PLAN).write_text(json.dumps({"marker": marker, "stale": sorted(stale)}), encoding="utf-8")
    sync(partial / _PLAN)
    sync(partial)
    partial.rename(hidden_path(target, "ready", target))
    sync(target)
    try:
        finish_replacing(target)
    except (KeyboardInterrupt, SystemExit):
        finish_replacing(target)
        raise


def finish_replacing(target: Path) -> None:
    """Move in what a folder is being replaced with, if it is; can be stopped anywhere, and done again.

    Raises:
        OutputError: as `check_names`, or a plan that cannot be read.
    """
    ready = hidden_path(target, "ready", target)
    if not is_being_replaced(target):
        remove_path(ready)
        return
    try:
        plan = load_json(ready / _PLAN)
        marker, stale = plan["marker"], plan["stale"]
        check_names(target, [marker, *stale, *(file.name for file in ready.iterdir())])
    except (InputError, KeyError, TypeError) as error:
        raise OutputError(f"{ready} is no folder that this tool wrote", action="remove it yourself") from error
    if (ready / marker).is_file():
        for name in (marker, *stale):
            (target / name).unlink(missing_ok=True)
        sync(target)
        for file in ready.iterdir():
            if file.name not in (marker, _PLAN):
                os.replace(file, target / file.name)
        sync(target)
        os.replace(ready / marker, target / marker)
        sync(target)
    remove_path(ready)
    sync(target)
