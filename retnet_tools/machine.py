"""The machine that this process runs on: its processor, and the memory that can be had."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Machine:
    """What figures were measured on.

    Attributes:
        processor: its name.
        cores: that this process may use.
        memory_bytes: in all; None where that is not known.
        system: operating system and release.
    """

    processor: str
    cores: int
    memory_bytes: int | None
    system: str


def this_machine() -> Machine:
    """A description of this machine."""
    found = re.search(r"^model name\s*: (.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        processor=found[1].strip() if found else platform.processor() or platform.machine(),
        cores=cores,
        memory_bytes=_physical_memory(),
        system=f"{platform.system()} {platform.release()}",
    )


def available_memory() -> int | None:
    """Bytes that new allocations can have: what the kernel says, at most what the container has left.

    A container has left what it is allowed less what it uses, of which the file cache can be given up. The machine's
    whole memory where the kernel does not say; None where nothing is known.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE)
    amounts = [int(found[1]) * 1024] if found else []
    amounts += [left for folder in _control_groups() if (left := _left(folder)) is not None]
    return min(amounts, default=_physical_memory())


def _control_groups() -> list[str]:
    """The folders of this process's control group and of those that it is in; limits hold at each."""
    found = re.search(r"^0::(/.*)$", _text("/proc/self/cgroup"), re.MULTILINE)
    path = PurePosixPath(found[1] if found else "/")
    return [f"/sys/fs/cgroup{part if part != '/' else ''}" for part in map(str, (path, *path.parents))]


def _left(group: str) -> int | None:
    """Bytes that a control group may still take; None without a limit."""
    limit, used = (_text(f"{group}/memory.{name}").strip() for name in ("max", "current"))
    if not limit.isdecimal():
        return None
    cache = re.search(r"^inactive_file (\d+)$", _text(f"{group}/memory.stat"), re.MULTILINE)
    in_use = int(used) - (int(cache[1]) if cache else 0) if used.isdecimal() else 0
    return max(0, int(limit) - max(0, in_use))


def _physical_memory() -> int | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
