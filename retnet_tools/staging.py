"""Output folders and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from retnet_tools.console import LOG
from retnet_tools.errors import InputError, OutputError, UsageError

if sys.platform != "win32":
    import fcntl


@contextmanager
def staged_folder(target: Path, *, marker: str, required_bytes: int, stale: Collection[str] = ()) -> Iterator[Path]:
    """A hidden folder beside `target` to write into; its files appear in `target` at the end, `marker` last.

    On any error it is removed, with every folder that was made for it. What a killed process left is removed by the
    next run for the same target. Files of other names in an existing target are never touched; files of the same
    names are replaced, so check the target first.

    Args:
        target: the folder to make; a link is followed.
        marker: the file that says a folder is complete: removed first and written last.
        required_bytes: what will be written; checked against the free space first.
        stale: further files of an existing target to remove.

    Raises:
        OutputError: the disk is too small or becomes full, or writing is not allowed.
        InputError: a file elsewhere cannot be read.
    """
    with _partial(target, "a folder", f"{required_bytes / 1e9:.2f} GB free") as (target, partial):
        partial.mkdir()
        free = shutil.disk_usage(partial).free
        if free < required_bytes:
            raise OutputError(
                f"{free / 1e9:.2f} GB free for {target}",
                f"{required_bytes / 1e9:.2f} GB",
                "free space or choose another -o",
            )
        yield partial
        _publish(partial, target, marker, stale)
    LOG.debug("wrote %s", target)


@contextmanager
def staged_file(target: Path, *, force: bool) -> Iterator[Path]:
    """A hidden path beside `target` to write a file to, which takes the target's place at the end, or goes away.

    Raises:
        UsageError, OutputError: as `check_file`.
        OutputError: the disk becomes full, or writing is not allowed.
    """
    check_file(target, force=force)
    with _partial(target, "a file") as (target, partial):
        yield partial
        os.replace(partial, target)


@contextmanager
def appended_file(target: Path) -> Iterator[IO[bytes]]:
    """A file to write more to, locked meanwhile against other processes; one made here goes away if it stays empty.

    Where the system or the file system has no locks, there is none.

    Raises:
        OutputError: the target is no file.
        UsageError: another process writes to it.
    """
    if target.exists() and not target.is_file():
        raise OutputError(f"{target} is no file", "a file to write", "name another output")
    new, mine = not target.exists(), False
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with target.open("ab") as file:
            _lock(file, target)
            mine = new
            yield file
    except BaseException:
        with suppress(FileNotFoundError):
            if mine and not target.stat().st_size:
                target.unlink()
        raise


@contextmanager
def _partial(target: Path, kind: str, room: str = "free space") -> Iterator[tuple[Path, Path]]:
    """The target without links, and a path beside it; if the work fails, that is removed with the parents made for it.

    Errors say that the target should have been `kind`, and a full disk should have had `room`.
    """
    target = target.resolve()
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    made = [parent for parent in partial.parents if not parent.exists()]
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        yield target, partial
    except OSError as error:
        _remove(partial, made)
        if is_disk_full(error):
            raise OutputError(f"the disk is full: {target} not written", room, "free space") from error
        reason = error.strerror or str(error)
        if error.filename is not None and target.parent not in Path(os.fsdecode(error.filename)).resolve().parents:
            raise InputError(f"cannot read {os.fsdecode(error.filename)} ({reason})", "a readable file") from error
        raise OutputError(f"cannot write {target} ({reason})", f"{kind} that can be written") from error
    except BaseException:
        _remove(partial, made)
        raise


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that there is no room to write to."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_file(target: Path, *, force: bool) -> None:
    """Check that a file may be written.

    Raises:
        UsageError: it exists and `force` is off.
        OutputError: it is a folder.
    """
    if target.is_dir():
        raise OutputError(f"{target} is a folder", "a file to write", "name another output")
    if target.exists() and not force:
        raise _exists(target)


def check_target(target: Path, *, marker: str, force: bool, source: Path | None = None) -> None:
    """Check that a target is free, or that it may be written over.

    Args:
        source: what the output is made of, which it must not replace.

    Raises:
        UsageError: it exists and `force` is off, or it is the source, under whatever name.
        OutputError: it exists and is not a folder with the marker.
    """
    if source is not None and source.exists() and target.exists() and target.samefile(source):
        raise UsageError(f"{target} is both input and output", "another output", "name one with -o")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise _exists(target)
    if not (target / marker).is_file():
        raise OutputError(
            f"{target} is not a folder that this command wrote (no {marker})", action="remove it yourself"
        )


def _exists(target: Path) -> UsageError:
    return UsageError(f"{target} exists already", action="name another output with -o, or add --force to replace it")


def _lock(file: IO[bytes], target: Path) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"another process writes to {target}", "one at a time", "wait for it, or name another output"
        ) from error
    except OSError:
        # A file system without locks.
        return


def _publish(partial: Path, target: Path, marker: str, stale: Collection[str]) -> None:
    if not target.exists():
        partial.rename(target)
        return
    for name in (marker, *stale):
        (target / name).unlink(missing_ok=True)
    for name in sorted((file.name for file in partial.iterdir()), key=lambda name: name == marker):
        os.replace(partial / name, target / name)
    partial.rmdir()


def _remove(partial: Path, made: Collection[Path]) -> None:
    _remove_path(partial)
    for parent in made:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def _remove_path(path: Path) -> None:
    path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    """Remove what runs for this target left whose process is gone."""
    pattern = re.compile(re.escape(f".{target.name}.partial-") + r"(\d+)")
    for path in target.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and not _is_alive(int(match[1])):
            _remove_path(path)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
