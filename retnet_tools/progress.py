"""How long work says how far it is; what it is told to is the caller's business."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what runs now, the steps done and the steps in all."""
ByteProgress = Callable[[int], None]
"""Called with the number of bytes that were written or read since the last call."""


def no_progress(what: str, done: int, total: int) -> None:
    """Say nothing."""


def in_megabytes(progress: Progress, what: str, total: int) -> ByteProgress:
    """What tells of bytes as of megabytes done, of `total` bytes."""
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        progress(f"{what}, MB", round(done / 1e6), round(total / 1e6))

    return tell
