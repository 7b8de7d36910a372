"""Part of a file, as a file."""

from __future__ import annotations

import io
from typing import IO, Any


class FileWindow(io.RawIOBase):
    """`length` bytes of a file from `start`; to be read through `io.BufferedReader`."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, which may lie past the end."""
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence] + offset
        if self._at < 0:
            raise ValueError("a place before the start")
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as there is data."""
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
