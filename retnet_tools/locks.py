"""Lock files: one process at a time, with nothing left to clean up by hand where the system has locks."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from retnet_tools.errors import UsageError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)


@contextmanager
def lock_file(path: Path, target: Path) -> Iterator[None]:
    """Hold the lock file of a target; the file goes away with the lock.

    The system drops the lock of a process that dies, whatever its number and wherever it ran; its file stays, and means
    nothing. Where a file system has no locks the file is the lock, and that of a process that died has to be removed
    by hand.

    Raises:
        UsageError: another process holds it.
        OSError: the file cannot be made.
    """
    file = _acquire(path, target)
    try:
        yield
    finally:
        # Windows removes no open file.
        if sys.platform == "win32":
            file.close()
        with suppress(OSError):
            path.unlink()
        file.close()


def _acquire(path: Path, target: Path) -> IO[bytes]:
    """An open file with the lock; whoever lets go of it lets go of the lock."""
    while True:
        file, new = _open(path)
        try:
            if not _lock(file.fileno()) and not new:
                raise _busy(target, f"if none does, remove {path}: this file system has no locks")
            # Whoever held it may have removed the file that was opened here.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError as error:
            file.close()
            raise _busy(target, "wait for it, or name another output") from error
        except BaseException:
            file.close()
            raise
        file.close()


def _open(path: Path) -> tuple[IO[bytes], bool]:
    """A file, and whether it was made now. One of another user's can be locked by who may read it."""
    flags, no_link = os.O_RDWR, getattr(os, "O_NOFOLLOW", 0)
    while True:
        with suppress(FileExistsError):
            return os.fdopen(os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), "r+b", 0), True
        try:
            return os.fdopen(os.open(path, flags | no_link), "r+b" if flags == os.O_RDWR else "rb", 0), False
        except FileNotFoundError:
            continue
        except PermissionError:
            if flags != os.O_RDWR:
                raise
            flags = os.O_RDONLY


def _lock(handle: int) -> bool:
    """Lock an open file; False where the file system has no locks.

    Raises:
        BlockingIOError: another process has it.
    """
    try:
        if sys.platform == "win32":
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            raise BlockingIOError(error.errno, error.strerror) from error
        return False
    return True


def _busy(target: Path, action: str) -> UsageError:
    return UsageError(f"another process writes to {target}", "one at a time", action)
