"""Files and folders as the system has them: put on the disk, removed, given hidden names; its errors as one line."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from retnet_tools.errors import InputError, OutputError

if sys.platform == "darwin":
    import fcntl

MAX_NAME = 255
"""Bytes that common file systems allow in a name."""
KINDS = ("lock", "partial", "ready", "unfinished")
"""Of hidden names."""
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EPERM)


def hidden_path(target: Path, kind: str, folder: Path) -> Path:
    """The path in a folder that belongs to a target: `.<name>.<kind>`, with a hash for a name that is too long."""
    name = target.name
    if len(os.fsencode(f".{name}.{kind}")) > MAX_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return folder / f".{name}.{kind}"


def is_hidden(path: Path) -> bool:
    """Whether a name is one of those."""
    return re.fullmatch(rf"\..+\.({'|'.join(KINDS)})", path.name, re.DOTALL) is not None


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk; of folders that cannot be synced the names are left to it."""
    folder = path.is_dir()
    if folder and sys.platform == "win32":
        # Windows writes names through, and opens no folder.
        return
    try:
        handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
        try:
            sync_handle(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not folder or error.errno not in _NO_SYNC:
            raise


def sync_handle(handle: int) -> None:
    """Put what was written to an open file on the disk; on macOS `fsync` alone stops at the drive's cache."""
    if sys.platform == "darwin":
        with suppress(OSError):
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    os.fsync(handle)


def flush(file: IO[bytes]) -> None:
    """Put what was written to a file on the disk."""
    file.flush()
    sync_handle(file.fileno())


def make_folders(folder: Path) -> list[Path]:
    """Make a folder and what lacks above it, on the disk; gives what was made, the innermost first."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        sync(path.parent)
    return made


def make_private(folder: Path) -> None:
    """Make a folder, where there is none, that this user alone may look into."""
    make_folders(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def remove_path(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_empty(*folders: Path) -> None:
    """Remove folders that hold nothing, in this order."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def check_place(folder: Path) -> None:
    """Check that a folder, or the nearest one above it that exists, takes files.

    Raises:
        OutputError: it does not.
    """
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file", "a folder to write to", "name another output")
    with writing_to(folder, "a folder"):
        tempfile.TemporaryFile(dir=folder).close()


def real_path(target: Path) -> Path:
    """A path without links.

    Raises:
        OutputError: links that lead nowhere else than to themselves, or folders that may not be looked into.
    """
    try:
        path = target.resolve()
        path.exists()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "a link to itself"
        raise OutputError(f"cannot write {target} ({reason})", "another place", "name another output") from error
    return path


@contextmanager
def writing_to(target: Path, kind: str, room: str = "free space") -> Iterator[None]:
    """Errors of the system as one line: the target should have been `kind`, and a full disk should have had `room`.

    Raises:
        OutputError: it cannot be written.
        InputError: a file elsewhere cannot be read.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"the disk is full: {target} not written", room, "free space") from error
        if error.errno == errno.EFBIG:
            raise OutputError(
                f"{target} not written: a file of it is larger than the file system or a limit of this process allows",
                action="write it elsewhere",
            ) from error
        if error.filename is not None and not _belongs(Path(os.fsdecode(error.filename)), target):
            raise InputError(f"cannot read {os.fsdecode(error.filename)} ({reason})", "a readable file") from error
        raise OutputError(f"cannot write {target} ({reason})", f"{kind} that can be written") from error


def _belongs(path: Path, target: Path) -> bool:
    """Whether a path is what is being written, in it, or one of the folders that it is written to."""
    mine = any(is_hidden(part) for part in (path, *path.parents))
    path = path.resolve()
    return mine or path == target or target in path.parents or path in target.parents
