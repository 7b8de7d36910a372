"""Repetitions of all tests of a kind: implementations take turns, and the device is measured beside them.

Each implementation runs in a process of its own. Those of one repetition are a crew: open together, each opened again
where it was lost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from retnet_tools.bench.floor import ProbeSpec, ProductShape
from retnet_tools.bench.implementations import Implementation
from retnet_tools.bench.options import RETNET, Case, Kind
from retnet_tools.bench.results import BenchRow, SkippedTest
from retnet_tools.bench.rows import Observed, Repetition, Sample, deviating, make_row
from retnet_tools.bench.worker import MemoryShortageError, Worker, WorkerError
from retnet_tools.errors import RetNetToolsError
from retnet_tools.machine import available_memory
from retnet_tools.progress import Progress
from retnet_tools.runtime.providers import Device

MEMORY_MARGIN = 1 << 28
"""Bytes that stay free when a test is checked against the memory there is."""
Key = tuple[str, Case]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """How a round is run.

    Attributes:
        probes: the folder of the graphs that measure the device.
        shape: of the product there.
        quick: small buffers in these measurements.
        again: how many times repetitions that deviate are made again, at most.
    """

    repetitions: int
    probes: Path
    shape: ProductShape
    quick: bool
    again: int = 0


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


class Round:
    """All tests of one kind on one number of threads.

    Every repetition has new processes: what differs from one process to another is in the deviation. Those of one
    repetition are open together and take turns.

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
        self._seen: defaultdict[Key, dict[int, Repetition]] = defaultdict(dict)
        self._judged: set[Key] = set()
        self._skipped: dict[Key, str] = {}
        self._made_again: defaultdict[Case, set[int]] = defaultdict(set)

    @property
    def skipped(self) -> list[SkippedTest]:
        """What was not run, or not as often as it should have been."""
        return [
            SkippedTest(name, test.name, test.batch, self._threads, reason, len(self._seen[name, test]))
            for (name, test), reason in self._skipped.items()
        ]

    def run(self, progress: Progress, done: int, total: int) -> int:
        """Measure; returns how many steps of progress are done then.

        Raises:
            RetNetToolsError: RetNet cannot be opened, or fails for another reason than memory. An alternative that
                fails, and a test that memory does not suffice for, is skipped from then on.
        """

        with ExitStack() as stack:
            probes: list[Worker] = []

            def repeat(repetition: int, tests: Sequence[Case]) -> None:
                def say(what: str, number: int = 0) -> None:
                    progress(f"repetition {repetition + 1}: {what}", done + number, total)

                with Crew(self._pending(), self._tests[0].kind, self._threads, say) as crew:
                    self._give_up(crew)
                    if crew.device is not None:
                        if not probes:
                            probes.append(stack.enter_context(Worker("the probes", self._probe(crew.device))))
                        self._repeat(repetition, tests, crew, probes[0], say)
                        self._give_up(crew)

            for repetition in range(self._setting.repetitions):
                repeat(repetition, self._tests)
                done += len(self._tests)
            for _ in range(self._setting.again):
                for repetition, tests in self._deviating().items():
                    repeat(repetition, tests)
                    for test in tests:
                        self._made_again[test].add(repetition)
        return done

    def rows(self) -> Iterable[BenchRow]:
        """A row for each test and implementation that ran it."""
        for test in self._tests:
            for implementation in self._implementations:
                if seen := self._seen.get((implementation.name, test)):
                    beside: Observed | None = self._seen[RETNET, test] if implementation.name != RETNET else None
                    again = self._made_again[test] & seen.keys()
                    yield make_row(implementation.subject, test, self._threads, seen, beside, again)

    def _deviating(self) -> dict[int, list[Case]]:
        """Repetitions in which a test of any implementation deviates, and these tests: all take their turns again."""
        found: defaultdict[int, list[Case]] = defaultdict(list)
        for test in self._tests:
            seen = (self._seen[implementation.name, test] for implementation in self._implementations)
            for repetition in sorted({i for observed in seen if observed for i in deviating(test, observed)}):
                found[repetition].append(test)
        return found

    def _repeat(
        self, repetition: int, tests: Sequence[Case], crew: Crew, probe: Worker, say: Callable[[str, int], None]
    ) -> None:
        methods = ("bandwidth",) if self._tests[0].kind == "decode" else ("bandwidth", "product_rate")
        # Small tests first: what ONNX Runtime keeps of a large one would be counted to them.
        for number, test in enumerate(sorted(tests, key=lambda test: test.batch * test.room)):
            if all((i.name, test) in self._skipped for i in self._implementations):
                continue
            samples: dict[str, Sample] = {}
            say(f"{test.name}, batch {test.batch}, {self._threads or 'all'} threads", number)
            before = {method: float(probe.call(method)) for method in methods}
            # Whoever goes first in one repetition goes last in the next, so that a drift favours nobody.
            for implementation in self._implementations[:: -1 if repetition % 2 else 1]:
                if (sample := self._sample(crew, implementation, test)) is not None:
                    samples[implementation.name] = sample
            after = {method: float(probe.call(method)) for method in methods}
            bandwidth = (before["bandwidth"] + after["bandwidth"]) / 2
            # A Gemm is over so soon that a moment's disturbance can halve its rate; prompts outlast it.
            product_rate = max(before["product_rate"], after["product_rate"]) if "product_rate" in methods else None
            for name, sample in samples.items():
                self._seen[name, test][repetition] = Repetition(sample, bandwidth, product_rate)

    def _sample(self, crew: Crew, implementation: Implementation, test: Case) -> Sample | None:
        """One repetition; None where the test is skipped, from now on."""
        name = implementation.name
        worker = None if (name, test) in self._skipped else crew.worker(implementation)
        if worker is None:
            return None
        try:
            if (name, test) not in self._judged:
                self._judged.add((name, test))
                if reason := _too_large(implementation, worker, test):
                    self._skipped[name, test] = reason
                    return None
            sample: Sample = worker.call("run", test)
        except (WorkerError, MemoryShortageError) as error:
            # Only this test; the next one gets a new process.
            crew.dismiss(name)
            self._skipped[name, test] = str(error)
            return None
        except RetNetToolsError as error:
            if name == RETNET:
                raise
            self._skipped[name, test] = str(error)
            return None
        return sample

    def _pending(self) -> list[Implementation]:
        """Those that still have a test to run."""
        return [i for i in self._implementations if any((i.name, test) not in self._skipped for test in self._tests)]

    def _give_up(self, crew: Crew) -> None:
        """Skip what cannot be opened: RetNet must open once."""
        for name, error in crew.closed.items():
            if name == RETNET and not any(self._seen[RETNET, test] for test in self._tests):
                raise error
            for test in self._tests:
                self._skipped.setdefault((name, test), str(error))

    def _probe(self, device: Device) -> ProbeSpec:
        setting = self._setting
        return ProbeSpec(device, self._threads, setting.probes, setting.shape, setting.quick)


def _too_large(implementation: Implementation, worker: Worker, test: Case) -> str | None:
    """Why a test does not fit into the memory there is; None where it does, or where that is not known."""
    needed, room = implementation.bytes_needed(test), worker.call("room")
    if room is None or needed + MEMORY_MARGIN <= room:
        return None
    return f"it needs {needed / 1e9:.1f} GB beside its weights, and {room / 1e9:.1f} GB are free"
