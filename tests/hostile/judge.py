"""Whether a hostile input is refused as it should be: in one line that names it, soon, in little memory, and with
nothing written or run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from retnet_tools.errors import RetNetToolsError
from tests.hostile.material import Files, put, reader, whole

MAX_SECONDS, MAX_BYTES, ADDRESS_ROOM = 5.0, 300 << 20, 2 << 30
CODES = (2, 5)


@dataclass(frozen=True)
class Case:
    """A hostile input: whole files of a kind, changed.

    Attributes:
        change: makes them hostile.
        says: what the error must name: the file, or the field of a document that has no name of a file for it.
    """

    kind: str
    name: str
    change: Callable[[Files], None]
    says: str

    def files(self) -> Files:
        files = whole(self.kind)
        self.change(files)
        return files

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


@dataclass
class Cost:
    """What reading took: processor time, and resident memory over what was there before."""

    seconds: float = 0.0
    bytes: int = 0


def _resident(what: str) -> int:
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(what))


def _hangs(_: int, __: FrameType | None) -> None:
    raise AssertionError("it hangs")


@contextlib.contextmanager
def ceilings() -> Iterator[Cost]:
    """Measures; ends what waits for ever, and lets no address space be taken for absurd sizes, where the system can."""
    cost, before = Cost(), 0
    linux = sys.platform == "linux"
    if linux:
        import resource

        Path("/proc/self/clear_refs").write_text("5")
        before, limits = _resident("VmRSS"), resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_resident("VmSize") + ADDRESS_ROOM, limits[1]))
    began = time.process_time()
    former = signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(60)
    try:
        yield cost
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
        cost.seconds = time.process_time() - began
        if linux:
            resource.setrlimit(resource.RLIMIT_AS, limits)
            cost.bytes = _resident("VmHWM") - before


def listing(folder: Path) -> list[tuple[str, int]]:
    """What lies in a folder and below, with sizes."""
    return sorted((str(path.relative_to(folder)), os.lstat(path).st_size) for path in folder.rglob("*"))


def refusal(case: Case, folder: Path) -> tuple[RetNetToolsError, Cost]:
    """The error with which a case is refused, and what that took; fails where it is not, or badly."""
    put(case.files(), folder)
    before, error = listing(folder), None
    with ceilings() as cost:
        try:
            reader(case.kind)(folder)
        except RetNetToolsError as found:
            error = found
    assert error is not None, "it is read"
    assert error.exit_code in CODES
    line = str(error)
    assert "\n" not in line
    assert line.isprintable()
    assert len(line) < 2000
    assert case.says in line, line
    assert listing(folder) == before, "something was written"
    assert cost.seconds < MAX_SECONDS
    assert cost.bytes < MAX_BYTES
    return error, cost
