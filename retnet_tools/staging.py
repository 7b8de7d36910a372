"""The only writer of outputs: each appears whole or not at all, and is on the disk when it does.

An output is made in a hidden place, `.<name>.partial`, beside its target, or inside it where the target is a folder
already (which may be a mount, or lie where nothing else may be written). It is flushed to the disk, then renamed into
place, the marker of a folder last. `.<name>.lock` beside the partial one is locked meanwhile: of two runs one wins, and
the other says so. The system drops the lock of a process that dies, so what lies there without one is abandoned, and
the next run for the same target removes it. `.<name>.publishing` tells a folder of ours whose files are being replaced
from one of somebody else's.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from retnet_tools.console import LOG
from retnet_tools.errors import InputError, OutputError, UsageError
from retnet_tools.locks import lock_file


@contextmanager
def staged_folder(
    target: Path,
    *,
    marker: str,
    required_bytes: int,
    force: bool,
    source: Path | None = None,
    ours: Collection[str] = (),
    stale: Callable[[], Collection[str]] = tuple,
) -> Iterator[Path]:
    """A folder to write files into; they appear in `target` at the end, `marker` last.

    On any error it is removed, with every folder that was made for it. In a target that is replaced, files of other
    names are never touched.

    Args:
        target: the folder to make; a link is followed.
        marker: the file that says a folder is complete: removed first and written last.
        required_bytes: what will be written; checked against the free space first.
        force, source, ours: as `check_folder`.
        stale: names further files of a replaced target to remove; called while no other run can change it.

    Raises:
        UsageError, OutputError: as `check_folder`, or another process writes to it.
        OutputError: the disk is too small or becomes full, or writing is not allowed.
        InputError: a file elsewhere cannot be read.
    """
    with _claimed(target, "a folder", f"{required_bytes / 1e9:.2f} GB free") as (target, partial):
        check_folder(target, marker=marker, force=force, source=source, ours=ours)
        remove_path(partial)
        partial.mkdir()
        free = shutil.disk_usage(partial).free
        if free < required_bytes:
            raise OutputError(
                f"{free / 1e9:.2f} GB free for {target}",
                f"{required_bytes / 1e9:.2f} GB",
                "free space or choose another -o",
            )
        yield partial
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        if partial.parent == target:
            _replace_files(partial, target, marker, stale())
        else:
            partial.rename(target)
            _sync(target.parent)
    LOG.debug("wrote %s", target)


@contextmanager
def staged_file(target: Path, *, force: bool) -> Iterator[Path]:
    """A path to write a file to, which takes the target's place at the end, or goes away.

    Raises:
        UsageError, OutputError: as `check_file`, or another process writes to it.
        OutputError: the disk becomes full, or writing is not allowed.
    """
    with _claimed(target, "a file") as (target, partial):
        check_file(target, force=force)
        remove_path(partial)
        yield partial
        _sync(partial)
        os.replace(partial, target)
        _sync(target.parent)


@contextmanager
def appended_file(target: Path) -> Iterator[IO[bytes]]:
    """A file to write more to, for one process at a time; one made here goes away if it stays empty.

    Raises:
        UsageError: another process writes to it.
        OutputError: the target is no file, the disk becomes full, or writing is not allowed.
    """
    with _claimed(target, "a file") as (target, _):
        check_file(target, force=True)
        new = not target.exists()
        try:
            with target.open("ab") as file:
                yield file
                flush(file)
            _sync(target.parent)
        except BaseException:
            with suppress(FileNotFoundError):
                if new and not target.stat().st_size:
                    target.unlink()
            raise


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep other processes from writing to a target.

    Raises:
        UsageError: one does already.
        OutputError: writing is not allowed.
    """
    with ExitStack() as stack:
        with writing_to(target, "a place"):
            target.parent.mkdir(parents=True, exist_ok=True)
            # Beside it, whether or not it is a folder by now.
            stack.enter_context(lock_file(target.with_name(f".{target.name}.lock"), target))
        yield


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """The same as `staged_file` where the place is `locked` already, and the target may be there.

    Raises:
        OutputError: the disk becomes full, or writing is not allowed.
    """
    partial = _hidden(target, "partial")
    try:
        with writing_to(target, "a file"):
            yield partial
            _sync(partial)
            os.replace(partial, target)
            _sync(target.parent)
    except BaseException:
        remove_path(partial)
        raise


def flush(file: IO[bytes]) -> None:
    """Put what was written to a file on the disk."""
    file.flush()
    os.fsync(file.fileno())


def check_file(target: Path, *, force: bool) -> None:
    """Check, before there is anything to write, that a file can be written.

    Raises:
        UsageError: it exists and `force` is off.
        OutputError: it is a folder, or nothing can be written there.
    """
    if target.exists() and not target.is_file():
        what = "a folder" if target.is_dir() else "no regular file"
        raise OutputError(f"{target} is {what}", "a file to write", "name another output")
    if target.exists() and not force:
        raise _exists(target)
    _check_place(target.resolve().parent)


def check_folder(
    target: Path, *, marker: str, force: bool, source: Path | None = None, ours: Collection[str] = ()
) -> None:
    """Check, before there is anything to write, that a folder can be written, or written over.

    Args:
        source: what the output is made of, which it must not replace.
        ours: what tells a folder that this tool wrote, where it has no marker.

    Raises:
        UsageError: it exists and `force` is off, or it is the source or holds it, under whatever name.
        OutputError: it holds something, but not the marker: it is somebody else's; or nothing can be written there.
    """
    path = target.resolve()
    origin = None if source is None or not source.exists() else source.resolve()
    if origin is not None and path.exists() and path in (origin, *origin.parents):
        raise UsageError(f"{target} is both input and output", "another output", "name one with -o")
    if path.exists() and not path.is_dir():
        raise OutputError(f"{target} is a file", "a folder", "name another output")
    hidden = {_hidden(path, kind).name for kind in ("lock", "partial", "publishing")}
    if path.exists() and any(file.name not in hidden for file in path.iterdir()):
        if not force:
            raise _exists(target)
        if not any((path / name).is_file() for name in (marker, *ours, _hidden(path, "publishing").name)):
            raise OutputError(
                f"{target} is not a folder that this command wrote (no {marker})", action="remove it yourself"
            )
    _check_place(path)


def _exists(target: Path) -> UsageError:
    return UsageError(f"{target} exists already", action="name another output with -o, or add --force to replace it")


def _hidden(target: Path, kind: str) -> Path:
    """A hidden path that belongs to a target: inside it where it is a folder, else beside it."""
    return (target if target.is_dir() else target.parent) / f".{target.name}.{kind}"


@contextmanager
def _claimed(target: Path, kind: str, room: str = "free space") -> Iterator[tuple[Path, Path]]:
    """The target without links, and the path to make it at, while no other process can.

    If the work fails, that path is removed, with the folders made for it.
    """
    target = target.resolve()
    partial, lock = _hidden(target, "partial"), _hidden(target, "lock")
    with writing_to(target, kind, room):
        made = [parent for parent in partial.parents if not parent.exists()]
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            if partial.parent == target:
                _clear_beside(target)
            with lock_file(lock, target):
                try:
                    yield target, partial
                except BaseException:
                    remove_path(partial)
                    raise
        except BaseException:
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()
            raise


def _clear_beside(folder: Path) -> None:
    """Remove what a run left beside a folder that was not there when it began.

    Raises:
        UsageError: it is still at work.
    """
    lock = folder.with_name(f".{folder.name}.lock")
    with suppress(OSError):
        if lock.exists():
            with lock_file(lock, folder):
                remove_path(folder.with_name(f".{folder.name}.partial"))


@contextmanager
def writing_to(target: Path, kind: str, room: str = "free space") -> Iterator[None]:
    """Errors of the system as one line: the target should have been `kind`, and a full disk should have had `room`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(f"the disk is full: {target} not written", room, "free space") from error
        reason = error.strerror or str(error)
        if error.filename is not None and not _belongs(Path(os.fsdecode(error.filename)), target):
            raise InputError(f"cannot read {os.fsdecode(error.filename)} ({reason})", "a readable file") from error
        raise OutputError(f"cannot write {target} ({reason})", f"{kind} that can be written") from error


def _belongs(path: Path, target: Path) -> bool:
    """Whether a path is what is being written, in it, or one of the folders that it is written to."""
    path = path.resolve()
    mine = any(part.name.startswith(f".{target.name}.") for part in (path, *path.parents))
    return mine or path == target or target in path.parents or path in target.parents


def _check_place(folder: Path) -> None:
    """Check that a folder, or the nearest one above it that exists, takes files."""
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file", "a folder to write to", "name another output")
    with writing_to(folder, "a folder"):
        tempfile.TemporaryFile(dir=folder).close()


def _replace_files(partial: Path, target: Path, marker: str, stale: Collection[str]) -> None:
    """Put the files of a folder into another, in place of those of the same names; without the marker until all are."""
    publishing = _hidden(target, "publishing")
    publishing.touch()
    _sync(target)
    for name in (marker, *stale):
        (target / name).unlink(missing_ok=True)
    _sync(target)
    for name in sorted((file.name for file in partial.iterdir()), key=lambda name: name == marker):
        if name == marker:
            _sync(target)
        os.replace(partial / name, target / name)
    partial.rmdir()
    publishing.unlink()
    _sync(target)


def _sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk."""
    if sys.platform == "win32" and path.is_dir():
        # Windows writes names through, and opens no folder.
        return
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_path(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
