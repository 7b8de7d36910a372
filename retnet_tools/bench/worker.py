"""A process for each implementation: its memory is its own, and it waits while the others are measured.

    python -m retnet_tools.bench.worker     reads a spec and requests from stdin, writes replies to stdout

Everything is pickled: first a `Spec`, then (method, arguments) of `Measurements`, or of `Probes` for a `ProbeSpec`. A
reply is (True, result) or (False, error).
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from retnet_tools.bench.floor import Probes, ProbeSpec
from retnet_tools.bench.measurements import Measurements
from retnet_tools.bench.specs import EngineSpec
from retnet_tools.errors import RetNetToolsError
from retnet_tools.runtime.failures import is_out_of_memory
from retnet_tools.runtime.packed_weights import VARIABLE as CACHE

_MODULE = "retnet_tools.bench.worker"
Spec = EngineSpec | ProbeSpec


class Worker:
    """The caller's side of the process. It starts at once, opens the spec on entering the context, and ends on leaving.

    Args:
        name: of the implementation, for errors.
        spec: what to open.
    """

    def __init__(self, name: str, spec: Spec) -> None:
        self.name, self._spec = name, spec
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        # Models of a benchmark are gone after it, and opening is not what is measured here.
        environment[CACHE] = "off"
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def __enter__(self) -> Self:
        """Open the spec.

        Raises:
            RetNetToolsError: what opening it raised, or the process ended.
        """
        try:
            self._exchange(self._spec)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """The result of a method of what was opened.

        Raises:
            RetNetToolsError: what it raised, or the process ended.
        """
        return self._exchange((method, arguments))

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                # What the process did not read any more is flushed into nothing.
                with suppress(OSError):
                    stream.close()

    def _exchange(self, message: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
            succeeded, result = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            code = self._process.wait()
            raise WorkerError(
                f"the process that runs {self.name} ended with {_ending(code)}",
                action="it was probably out of memory: measure smaller batches or contexts" if code == -9 else "",
            ) from error
        if not succeeded:
            raise result
        return result


class WorkerError(RetNetToolsError):
    """A measuring process is gone."""


class MemoryShortageError(RetNetToolsError):
    """A measuring process, or its GPU, has not enough memory for what it was asked for."""


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def main() -> None:
    """The process: opens what it is told to, then answers until its caller is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # Libraries that print must not write into the replies.
    os.dup2(2, 1)
    opened: list[Measurements | Probes] = []

    def answer(message: Any) -> Any:
        if not opened:
            return opened.append(_open(message))
        method, arguments = message
        return getattr(opened[0], method)(*arguments)

    while True:
        try:
            message = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(_attempt(answer, message), replies)
        replies.flush()


def _open(spec: Spec) -> Measurements | Probes:
    if isinstance(spec, ProbeSpec):
        return Probes(spec)
    module, name = spec.engine.split(":")
    return Measurements(getattr(importlib.import_module(module), name), spec)


def _attempt(answer: Callable[[Any], Any], message: Any) -> tuple[bool, Any]:
    try:
        return True, answer(message)
    except RetNetToolsError as error:
        if is_out_of_memory(error):
            shortage = MemoryShortageError(error.found, error.expected, error.action)
            shortage.exit_code = error.exit_code
            return False, shortage
        return False, error
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError) or is_out_of_memory(error) or "bad_alloc" in text:
            reason = f"not enough memory ({text})" if text else "not enough memory"
            return False, MemoryShortageError(reason, action="measure smaller batches or contexts")
        return False, RetNetToolsError(f"unexpected {type(error).__name__} while measuring: {text}")


if __name__ == "__main__":
    main()
