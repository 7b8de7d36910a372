"""Output folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retnet_tools.errors import OutputError, UsageError

PARTIAL_SUFFIX = ".partial"


@contextmanager
def staged_folder(target: Path, *, marker: str, force: bool, required_bytes: int) -> Iterator[Path]:
    """A folder beside `target` to write into; renamed to `target` at the end, removed on any error.

    A killed process leaves `<target>.partial` behind, which the next run replaces.

    Args:
        target: the folder to make.
        marker: a file that every folder of this kind holds; with `force`, only a folder with it is replaced.
        force: replace an existing folder.
        required_bytes: what will be written; checked against the free space first.

    Raises:
        UsageError: the target exists and `force` is off.
        OutputError: the target is something else, the disk is too small or becomes full, or writing is not allowed.
    """
    check_target(target, marker=marker, force=force)
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < required_bytes:
            raise OutputError(
                f"{free / 1e9:.2f} GB free for {target}",
                f"{required_bytes / 1e9:.2f} GB",
                "free space or choose another -o",
            )
        yield partial
        _replace(partial, target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(
                f"the disk is full: {target} not written", f"{required_bytes / 1e9:.2f} GB free"
            ) from error
        raise OutputError(
            f"cannot write {target} ({error.strerror or error})", "a folder that can be written"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_target(target: Path, *, marker: str, force: bool) -> None:
    """Check that a target is free, or that it may be replaced.

    Raises:
        UsageError: it exists and `force` is off.
        OutputError: it exists and is not a folder with the marker.
    """
    if not target.exists() and not target.is_symlink():
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    if not force:
        raise UsageError(f"{target} exists already", action="name another output with -o, or add --force to replace it")
    if not (target / marker).is_file():
        raise OutputError(
            f"{target} is not a folder that this command wrote (no {marker})", action="remove it yourself"
        )


def _replace(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = target.with_name(f"{target.name}.old-{os.getpid()}")
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)
