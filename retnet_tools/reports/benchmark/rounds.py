"""Repetitions of all tests of a kind: implementations take turns, and the device is measured beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from retnet_tools.errors import RetNetToolsError
from retnet_tools.graph.probes import ProductShape
from retnet_tools.machine import available_memory
from retnet_tools.reports.benchmark.implementations import Implementation
from retnet_tools.reports.benchmark.measurements import Sample
from retnet_tools.reports.benchmark.models import Progress
from retnet_tools.reports.benchmark.options import RETNET, Case
from retnet_tools.reports.benchmark.results import BenchRow, Observed, SkippedTest, make_row
from retnet_tools.reports.benchmark.worker import Worker

MEMORY_MARGIN = 1 << 28
"""Bytes that stay free when a test is checked against the memory there is."""


@dataclass(frozen=True)
class Setting:
    """How a round is run.

    Attributes:
        probes: the folder of the graphs that measure the device.
        shape: of the product there.
        quick: small buffers in these measurements.
    """

    repetitions: int
    probes: Path
    shape: ProductShape
    quick: bool


class Round:
    """All tests of one kind on one number of threads, in processes that stay open for all repetitions.

    Args:
        implementations: RetNet first.
    """

    def __init__(
        self,
        implementations: Sequence[Implementation],
        tests: Sequence[Case],
        threads: int | None,
        setting: Setting,
    ) -> None:
        self._implementations, self._tests, self._threads = list(implementations), list(tests), threads
        self._setting = setting
        self._seen: dict[tuple[str, Case], list[Sample]] = {}
        self._bandwidths: dict[Case, list[float]] = {test: [] for test in tests}
        self._product_rates: list[float] = []
        self.skipped: list[SkippedTest] = []

    def run(self, progress: Progress, done: int, total: int) -> int:
        """Measure; returns how many steps of progress are done then.

        Raises:
            RetNetToolsError: what RetNet's process raised. An alternative that fails is skipped from then on.
        """
        with ExitStack() as stack:
            workers = self._open(stack)
            for repetition in range(self._setting.repetitions):
                # Whoever goes first in one repetition goes last in the next, so that a drift favours nobody.
                order = self._implementations[:: -1 if repetition % 2 else 1]
                if any(test.kind == "prefill" for test in self._tests):
                    self._product_rates.append(self._probe(workers[RETNET], "product_rate", self._setting.shape))
                for test in self._tests:
                    progress(f"{test.name}, batch {test.batch}, {self._threads or 'all'} threads", done, total)
                    before = self._probe(workers[RETNET], "bandwidth")
                    for implementation in order:
                        if implementation.name in workers:
                            self._sample(implementation, workers[implementation.name], test)
                    self._bandwidths[test].append((before + self._probe(workers[RETNET], "bandwidth")) / 2)
                    done += 1
        return done

    def rows(self) -> Iterable[BenchRow]:
        """A row for each test and implementation that ran it every time."""
        for test in self._tests:
            observed = {i.name: self._observed(i, test) for i in self._implementations}
            for implementation in self._implementations:
                seen = observed[implementation.name]
                if seen is not None:
                    beside = None if implementation.name == RETNET else observed[RETNET]
                    yield make_row(implementation.subject, test, self._threads, seen, beside)

    def _open(self, stack: ExitStack) -> dict[str, Worker]:
        workers = {}
        for implementation in self._implementations:
            name = implementation.name
            try:
                workers[name] = stack.enter_context(Worker(name, implementation.spec(self._threads)))
            except RetNetToolsError as error:
                if name == RETNET:
                    raise
                for test in self._tests:
                    self._skip(name, test, str(error))
        return workers

    def _skip(self, name: str, test: Case, reason: str) -> None:
        self.skipped.append(SkippedTest(name, test.name, test.batch, self._threads, reason))

    def _probe(self, worker: Worker, method: str, *arguments: object) -> float:
        return float(worker.call(method, self._setting.probes, *arguments, self._setting.quick))

    def _sample(self, implementation: Implementation, worker: Worker, test: Case) -> None:
        if any(
            (s.implementation, s.test, s.batch) == (implementation.name, test.name, test.batch) for s in self.skipped
        ):
            return
        try:
            reason = _too_large(implementation, worker, test)
            if reason is None:
                self._seen.setdefault((implementation.name, test), []).append(worker.call("run", test))
        except RetNetToolsError as error:
            if implementation.name == RETNET:
                raise
            reason = str(error)
        if reason is not None:
            self._skip(implementation.name, test, reason)

    def _observed(self, implementation: Implementation, test: Case) -> Observed | None:
        samples = self._seen.get((implementation.name, test), [])
        if len(samples) < self._setting.repetitions:
            return None
        return Observed(
            seconds=[sample.seconds for sample in samples],
            peaks=[sample.peak_resident_bytes for sample in samples],
            device_bytes=[sample.device_bytes for sample in samples],
            bandwidths=self._bandwidths[test],
            product_rates=self._product_rates if test.kind == "prefill" else [],
        )


def _too_large(implementation: Implementation, worker: Worker, test: Case) -> str | None:
    """Why the states of a test do not fit into memory now; None where they do, or where that is not known."""
    needed = implementation.bytes_needed(test)
    free = worker.call("device_free")
    available = available_memory() if free is None else free
    if available is None or needed + MEMORY_MARGIN <= available:
        return None
    return f"its states need {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB are free"
