"""How much memory this process uses. It loads nothing, so that any process can say."""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path

_CLEAR_REFS = Path("/proc/self/clear_refs")


def trim() -> None:
    """Give back what the allocator keeps for later and nobody uses, where it offers that."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> bool:
    """Let the peak start again from what is in use now; whether the system did so."""
    trim()
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_resident() -> int | None:
    """The most bytes that were resident since `reset_peak`, mapped pages of files included; None where the system does
    not say. Without a reset it includes what loading took."""
    return _status("VmHWM")


def anonymous_resident() -> int | None:
    """Bytes that are resident now and of no file; None where the system does not say."""
    return _status("RssAnon")


def _status(name: str) -> int | None:
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        if found := re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE):
            return int(found[1]) * 1024
    return None
