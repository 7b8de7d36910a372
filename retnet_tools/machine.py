"""The machine that this process runs on: its processor, how much of it a job should take, and the memory it has."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

WORK_OF_A_THREAD = 1 << 32


@dataclass(frozen=True)
class Machine:
    """What figures were measured on: `cores` that this process may use, and memory in all, None where unknown."""

    processor: str
    cores: int
    memory_bytes: int | None
    system: str


def this_machine() -> Machine:
    """A description of this machine."""
    found = re.search(r"^model name\s*: (.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return Machine(
        processor=found[1].strip() if found else platform.processor() or platform.machine(),
        cores=allowed_cores(),
        memory_bytes=_physical_memory(),
        system=f"{platform.system()} {platform.release()}",
    )


def processor_features() -> str:
    """The kind of processor and its instruction sets, which decide what a library's kernels do."""
    found = re.search(r"^(?:flags|Features)\s*: (.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return f"{platform.machine()} {this_machine().processor} {found[1] if found else ''}".strip()


def allowed_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def torch_threads(parameters: int, tokens: int) -> int:
    """CPU threads worth starting for a network that is shown so many tokens at once: 1 to the allowed cores.

    The work is parameters x tokens multiply-adds, of which each thread gets at least 2^32, about a fifth of a second.
    Threads wait for each other after every operation, spinning, and where other processes want the cores they wait for
    a thread that has none. Two threads on the shipped model (4.2 million parameters, 512 tokens) took 0.5 to 1.2 times
    as long as one for single operations on two free cores, which saves a second of `verify`; but 2 to 7 times as long
    for whole runs on two cores that six more processes used, which costs half a minute.
    """
    return max(1, min(allowed_cores(), parameters * tokens // WORK_OF_A_THREAD))


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
