"""Measuring without a process for each implementation, and without buffers of several caches: for tests of what is
measured, counted and shown, not of processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import pytest

from retnet_tools.bench import flat, floor, profile, rounds
from retnet_tools.bench.floor import ProbeSpec
from retnet_tools.bench.worker import Spec, Worker, _attempt, _open


class Inline:
    """What `Worker` does, in this process."""

    def __init__(self, name: str, spec: Spec) -> None:
        self.name, self._spec = name, spec

    def __enter__(self) -> Self:
        self._opened = self._result(lambda _: _open(self._spec))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, method: str, *arguments: Any) -> Any:
        return self._result(lambda _: getattr(self._opened, method)(*arguments))

    def close(self) -> None:
        self._opened = None

    @staticmethod
    def _result(ask: Callable[[Any], Any]) -> Any:
        succeeded, result = _attempt(ask, None)
        if not succeeded:
            raise result
        return result


def measure_inline(monkeypatch: pytest.MonkeyPatch, *, probes_only: bool = False) -> None:
    """Let `bench` measure in this process.

    Args:
        probes_only: only what the device can do; implementations have processes of their own.
    """
    monkeypatch.setattr(floor, "read_sizes", lambda *, quick: (1 << 22,))

    def worker(name: str, spec: Spec) -> Any:
        return Inline(name, spec) if isinstance(spec, ProbeSpec) or not probes_only else Worker(name, spec)

    for module in (flat, profile, rounds):
        monkeypatch.setattr(module, "Worker", worker)
