"""pytest again and again, each run in a fork of a process that has loaded the libraries already.

    python tests/trials/warm_pytest.py LIBRARY...

A line of JSON on stdin is a run, `{"arguments", "output", "timeout", "compiled"}`: pytest's arguments, the file for
what it writes, seconds it may take, and whether compiled code of what it imports may be kept. A line on stdout is its
exit code, or null where it did not end. Started as a file in a copy of the repository: nothing of the repository is
loaded before a run.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any, NoReturn


def run(arguments: list[str], output: str, compiled: bool) -> NoReturn:
    """pytest, in a session of its own."""
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if not compiled:
        sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    code = 3
    try:
        import pytest

        code = int(pytest.main(arguments))
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(process: int, timeout: float) -> int | None:
    """The exit code of a run; None where it did not end, or nobody waits for it any more, and was ended."""
    end, code, asked_by = time.monotonic() + timeout, None, os.getppid()
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended or time.monotonic() > end or os.getppid() != asked_by:
            break
        time.sleep(0.02)
    if ended:
        code = os.waitstatus_to_exitcode(status)
    with suppress(ProcessLookupError):
        # Whatever of it is left, and what it has started.
        os.killpg(process, signal.SIGKILL)
    if not ended:
        os.waitpid(process, 0)
    return code


def main() -> None:
    """Run what comes, until stdin ends."""
    sys.path[0] = os.getcwd()
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        if not (process := os.fork()):
            run(order["arguments"], order["output"], order["compiled"])
        code = wait(process, order["timeout"])
        with suppress(BrokenPipeError):
            print(json.dumps(code), flush=True)


if __name__ == "__main__":
    main()
