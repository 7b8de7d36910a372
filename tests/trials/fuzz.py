"""Fuzzing of every reader of strangers' files: atheris on bytes, hypothesis on documents.

    python -m tests.trials.fuzz --minutes 30 --seed 1

The time is shared out evenly among the targets, one after another on one core. A crash is any exception that is not one
of the package's own, an input that takes longer than `MAX_SECONDS`, or more memory than `MAX_MEGABYTES` over what was
there before. What fails is kept in `--keep`, and `--target NAME --replay FILE` runs it again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.trials.fuzz_bytes import BYTES, fuzz_bytes, run_bytes

MIXED = "mixed"
"""All of bytes in one process, for a short run."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", metavar="NAME", help=f"{', '.join(BYTES)}, {MIXED}, or one of documents.")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "fuzz", metavar="FOLDER")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="Run one input of --target again.")
    parser.add_argument("--here", action="store_true", help="In this process, which then ends.")
    options = parser.parse_args()
    if options.replay is not None:
        run_bytes(options.target, options.replay.read_bytes())
        return 0
    if options.here:
        return fuzz_bytes(options.target, options.minutes * 60, options.seed, options.keep)
    # Not before: what is imported without atheris is not seen by it.
    from tests.trials.fuzz_documents import DOCUMENTS

    names = [options.target] if options.target else [*BYTES, *DOCUMENTS]
    if missing := not _has_atheris():
        print("atheris is not installed (pip install -e '.[fuzz]'): bytes are not fuzzed")
        names = [name for name in names if name in DOCUMENTS]
    began, total, failed = time.monotonic(), 0, []
    for left in range(len(names), 0, -1):
        name = names[-left]
        seconds = max(1.0, (60 * options.minutes - (time.monotonic() - began)) / left)
        started = time.monotonic()
        runs, problem = (_documents if name in DOCUMENTS else _bytes)(name, seconds, options.seed, options.keep)
        total += runs
        failed += [name] if problem else []
        spent, result = time.monotonic() - started, problem or "none failed"
        print(f"{name}: seed {options.seed}, {runs} inputs, {spent:.0f} s: {result}", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(f"fuzz: seed {options.seed}, {total} inputs, {len(names)} targets, {minutes:.1f} min, {len(failed)} failed")
    return 1 if failed or (missing and options.target in (*BYTES, MIXED)) else 0


def _has_atheris() -> bool:
    import importlib.util

    return importlib.util.find_spec("atheris") is not None


def _documents(name: str, seconds: float, seed: int, keep: Path) -> tuple[int, str]:
    from tests.trials.fuzz_documents import fuzz_documents

    try:
        return fuzz_documents(name, seconds, seed), ""
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        notes = " ".join(getattr(error, "__notes__", ()))
        return 0, f"{type(error).__name__}: {error} {notes}"


def _bytes(name: str, seconds: float, seed: int, keep: Path) -> tuple[int, str]:
    """Fuzz in a process of its own: libFuzzer ends the one that it runs in."""
    keep.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.trials.fuzz", "--target", name, "--here", "--seed", str(seed)]
    command += ["--minutes", str(seconds / 60), "--keep", str(keep)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    runs = [int(count) for count in re.findall(r"number_of_executed_units: (\d+)", result.stderr)]
    if result.returncode == 0 and runs:
        return runs[-1], ""
    lines = [
        line
        for line in result.stderr.splitlines()
        if re.search(r"^[\w.]*(Error|Exception|Exit)\b|ERROR: lib|written to", line)
    ]
    return (runs or [0])[-1], " | ".join(lines[-4:]) or f"exit {result.returncode}: {result.stderr[-500:]}"


if __name__ == "__main__":
    sys.exit(main())
