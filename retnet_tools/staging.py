"""The only writer of outputs: each appears whole or not at all, and is on the disk when it does.

An output is made in a hidden place, `.<name>.partial`, beside its target, or inside it where the target is a folder
already (which may be a mount, or lie where nothing else may be written). It is flushed to the disk, then renamed into
place (`retnet_tools.replacing`, where it replaces another folder's files). `.<name>.lock` beside the partial one is
locked meanwhile: of two runs one wins, and the other says so. The system drops the lock of a process that dies, so what
lies there without one is abandoned, and the next run for the same target removes it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from retnet_tools.console import LOG
from retnet_tools.disk import (
    check_place,
    flush,
    hidden_path,
    is_hidden,
    make_folders,
    real_path,
    remove_empty,
    remove_path,
    sync,
    writing_to,
)
from retnet_tools.errors import OutputError, UsageError
from retnet_tools.locks import lock_file
from retnet_tools.replacing import check_names, finish_replacing, is_being_replaced, replace_files


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
    names are never touched, but for those that `stale` names.

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

    def check() -> None:
        check_folder(target, marker=marker, force=force, source=source, ours=ours)

    with _claimed(target, "a folder", f"{required_bytes / 1e9:.2f} GB free") as (path, partial):
        if path.is_dir():
            finish_replacing(path)
        check()
        replaced = () if partial.parent != path else tuple(stale())
        check_names(path, replaced)
        partial.mkdir()
        free = shutil.disk_usage(partial).free
        if free < required_bytes:
            raise OutputError(
                f"{free / 1e9:.2f} GB free for {target}",
                f"{required_bytes / 1e9:.2f} GB",
                "free space or choose another -o",
            )
        yield partial
        # Somebody who does not know the lock may have come meanwhile.
        check()
        for file in partial.iterdir():
            sync(file)
        if partial.parent == path:
            replace_files(partial, path, marker, replaced)
        else:
            sync(partial)
            partial.rename(path)
            sync(path.parent)
    LOG.debug("wrote %s", target)


@contextmanager
def staged_file(target: Path, *, force: bool) -> Iterator[Path]:
    """A path to write a file to, which takes the target's place at the end, or goes away.

    Raises:
        UsageError, OutputError: as `check_file`, or another process writes to it.
        OutputError: the disk becomes full, or writing is not allowed.
    """
    with _claimed(target, "a file") as (path, partial):
        check_file(target, force=force)
        yield partial
        check_file(target, force=force)
        _put(partial, path)


@contextmanager
def appended_file(target: Path) -> Iterator[IO[bytes]]:
    """A file to write more to, for one process at a time; if that fails, one that was made here and is empty goes away.

    Raises:
        UsageError: another process writes to it.
        OutputError: the target is no file, the disk becomes full, or writing is not allowed.
    """
    with _claimed(target, "a file") as (path, _):
        check_file(target, force=True)
        new = not path.exists()
        try:
            with path.open("ab") as file:
                sync(path.parent)
                yield file
                flush(file)
        except BaseException:
            with suppress(FileNotFoundError):
                if new and not path.stat().st_size:
                    path.unlink()
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
            make_folders(target.parent)
            # Beside it, whether or not it is a folder by now.
            stack.enter_context(lock_file(hidden_path(target, "lock", target.parent), target))
        yield


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """The same as `staged_file` where the place is `locked` already, and the target may be there.

    Raises:
        OutputError: the disk becomes full, or writing is not allowed.
    """
    partial = hidden_path(target, "partial", target.parent)
    try:
        with writing_to(target, "a file"):
            yield partial
            _put(partial, target)
    except BaseException:
        remove_path(partial)
        raise


def check_file(target: Path, *, force: bool) -> None:
    """Check, before there is anything to write, that a file can be written.

    Raises:
        UsageError: it exists and `force` is off.
        OutputError: it is a folder, or nothing can be written there.
    """
    path = real_path(target)
    _check_name(path)
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file"
        raise OutputError(f"{target} is {what}", "a file to write", "name another output")
    if path.exists() and not force:
        raise _exists(target)
    check_place(path.parent)


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
    path = real_path(target)
    _check_name(path)
    origin = None if source is None or not source.exists() else source.resolve()
    if origin is not None and path.exists() and path in (origin, *origin.parents):
        raise UsageError(f"{target} is both input and output", "another output", "name one with -o")
    if path.exists() and not path.is_dir():
        raise OutputError(f"{target} is a file", "a folder", "name another output")
    own = [hidden_path(path, kind, path) for kind in ("lock", "partial", "ready")]
    with writing_to(path, "a folder"):
        found = path.exists() and any(file not in own for file in path.iterdir())
    if found:
        if not force:
            raise _exists(target)
        if not any((path / name).is_file() for name in (marker, *ours)) and not is_being_replaced(path):
            raise OutputError(
                f"{target} is not a folder that this command wrote (no {marker})", action="remove it yourself"
            )
    check_place(path)


def _exists(target: Path) -> UsageError:
    return UsageError(f"{target} exists already", action="name another output, or add --force to replace it")


def _check_name(path: Path) -> None:
    if is_hidden(path):
        raise OutputError(f"{path.name} is a name for work that is not finished", "another", "name another output")


@contextmanager
def _claimed(target: Path, kind: str, room: str = "free space") -> Iterator[tuple[Path, Path]]:
    """The target without links, and the path to make it at, while no other process can; nothing is there yet.

    If the work fails, that path is removed, with the folders made for it.
    """
    path = real_path(target)
    _check_name(path)
    home = path if path.is_dir() else path.parent
    partial = hidden_path(path, "partial", home)
    with writing_to(path, kind, room):
        made = make_folders(home)
        try:
            if home == path:
                _clear_beside(path)
            with lock_file(hidden_path(path, "lock", home), path):
                try:
                    remove_path(partial)
                    yield path, partial
                except BaseException:
                    remove_path(partial)
                    raise
        except BaseException:
            remove_empty(*made)
            raise


def _clear_beside(folder: Path) -> None:
    """Remove what a run left beside a folder that was not there when it began.

    Raises:
        UsageError: it is still at work.
    """
    lock = hidden_path(folder, "lock", folder.parent)
    with suppress(OSError):
        if lock.exists():
            with lock_file(lock, folder):
                remove_path(hidden_path(folder, "partial", folder.parent))


def _put(partial: Path, path: Path) -> None:
    """Put a file in the place of another, whose permissions it keeps."""
    sync(partial)
    with suppress(OSError):
        shutil.copymode(path, partial)
    os.replace(partial, path)
    sync(path.parent)
