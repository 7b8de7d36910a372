"""The processes of one repetition: open together, each opened again where it was lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from retnet_tools.bench.implementations import Implementation
from retnet_tools.bench.options import Kind
from retnet_tools.bench.worker import Worker
from retnet_tools.errors import RetNetToolsError
from retnet_tools.machine import available_memory
from retnet_tools.runtime.providers import Device

Say = Callable[[str], None]


class Crew:
    """An open process for each implementation.

    Args:
        implementations: in the order in which they are opened.
        kind: of the tests.
        threads: of each.
        say: told which model loads.

    Attributes:
        device: where the first one runs; None where it could not be opened. Others must run there too.
        closed: those that cannot be opened, and why.
    """

    def __init__(self, implementations: Sequence[Implementation], kind: Kind, threads: int | None, say: Say) -> None:
        self._implementations, self._kind, self._threads, self._say = implementations, kind, threads, say
        self._workers: dict[str, Worker] = {}
        self.device: Device | None = None
        self.closed: dict[str, RetNetToolsError] = {}

    def __enter__(self) -> Self:
        # Processes start side by side; models load one after another.
        starting = [self._start(implementation) for implementation in self._implementations]
        try:
            for implementation, worker in zip(self._implementations, starting, strict=True):
                self._open(implementation, worker)
        except BaseException:
            for worker in starting:
                worker.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._workers):
            self.dismiss(name)

    def worker(self, implementation: Implementation) -> Worker | None:
        """The process of an implementation, opened again where it is gone; None where that cannot be."""
        if implementation.name not in self._workers and implementation.name not in self.closed:
            self._open(implementation, self._start(implementation))
        return self._workers.get(implementation.name)

    def dismiss(self, name: str) -> None:
        """End a process."""
        self._workers.pop(name).close()

    def _start(self, implementation: Implementation) -> Worker:
        return Worker(implementation.name, implementation.spec(self._threads, self._kind))

    def _open(self, implementation: Implementation, worker: Worker) -> None:
        name = implementation.name
        self._say(f"loading {name}")
        try:
            self._check_weights(implementation)
            worker.__enter__()
            self._workers[name] = worker
            self._check_device(name, worker)
        except RetNetToolsError as error:
            self._workers.pop(name, None)
            worker.close()
            self.closed[name] = error

    def _check_weights(self, implementation: Implementation) -> None:
        """Refuse weights that do not fit beside those that are open; on a GPU, opening them does."""
        spec = implementation.spec(self._threads, self._kind)
        needed, free = implementation.weights(self._kind), available_memory()
        if spec.device.kind == "cpu" and free is not None and needed > free:
            raise RetNetToolsError(
                f"the weights of {implementation.name} need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
                action="measure a smaller model, --quantize it, or fewer alternatives at once",
            )

    def _check_device(self, name: str, worker: Worker) -> None:
        device: Device = worker.call("device")
        if self.device is None:
            self.device = device
        elif device.kind != self.device.kind:
            raise RetNetToolsError(f"{name} runs on {device}, and what it is measured against on {self.device}")
