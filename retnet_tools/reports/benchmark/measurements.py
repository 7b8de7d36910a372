"""What a measuring process does for its caller: times steps and prompts, watches its memory, probes the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retnet_tools.graph.probes import ProductShape
from retnet_tools.reports.benchmark.engines import Engine
from retnet_tools.reports.benchmark.floor import product_rate, read_bandwidth
from retnet_tools.reports.benchmark.memory import device_free, device_used, peak_resident, reset_peak
from retnet_tools.reports.benchmark.options import WARM_UP_STEPS, Case
from retnet_tools.reports.benchmark.specs import EngineSpec
from retnet_tools.weights import Array

_WARM_UP_PROMPT = 256


@dataclass(frozen=True)
class Sample:
    """One repetition of a test.

    Attributes:
        seconds: of each step, or of the whole prompt.
        peak_resident_bytes: of the process while it ran, its states in place; None where that is not known.
        device_bytes: of GPU memory that this process had taken by then.
    """

    seconds: tuple[float, ...]
    peak_resident_bytes: int | None
    device_bytes: int | None


class Measurements:
    """Opens an implementation and measures it.

    Only one measuring process works at a time, so what a GPU has less while this one works, this one has taken.
    """

    def __init__(self, engine: Callable[[EngineSpec], Engine], spec: EngineSpec) -> None:
        self._device, self._threads = spec.device, spec.threads
        self._taken = 0
        before = device_used(self._device)
        self._engine = engine(spec)
        self._take(before)

    def run(self, test: Case) -> Sample:
        """One repetition: the context is placed, warmed up, and the test timed, logits fetched after every call."""
        before = device_used(self._device)
        seconds = self._decode(test) if test.kind == "decode" else self._prefill(test)
        peak = peak_resident()
        self._take(before)
        self._engine.release()
        return Sample(tuple(seconds), peak, None if before is None else self._taken)

    def bandwidth(self, folder: Path, quick: bool) -> float:
        """Bytes a second; see `retnet_tools.reports.benchmark.floor.read_bandwidth`."""
        return read_bandwidth(self._device, self._threads, folder, quick=quick)

    def product_rate(self, folder: Path, shape: ProductShape, quick: bool) -> float:
        """Floating-point operations a second; see `retnet_tools.reports.benchmark.floor.product_rate`."""
        return product_rate(self._device, self._threads, folder, shape, quick=quick)

    def device_free(self) -> int | None:
        """Free bytes on a GPU; None on the CPU."""
        return device_free(self._device)

    def logits_at(self, positions: Array, input_ids: Array) -> Array:
        """Logits `[B, vocab]` of one token `[B]` for rows whose random states stand at these positions `[B]`."""
        self._engine.place(len(positions), positions, int(positions.max()) + 1)
        logits = self._engine.feed(input_ids[:, None])
        self._engine.release()
        return logits

    def profile(self, test: Case) -> Path:
        """Run a test in a session that profiles, and write the profile."""
        self._decode(test)
        return self._engine.end_profile()

    def _decode(self, test: Case) -> list[float]:
        ids = self._ids((WARM_UP_STEPS + test.tokens, test.batch, 1))
        self._engine.place(test.batch, test.depth, test.room)
        reset_peak()
        seconds = [self._timed(step) for step in ids]
        return seconds[WARM_UP_STEPS:]

    def _prefill(self, test: Case) -> list[float]:
        ids = self._ids((test.batch, test.tokens))
        self._engine.place(test.batch, 0, _WARM_UP_PROMPT)
        self._timed(ids[:, :_WARM_UP_PROMPT])
        self._engine.place(test.batch, test.depth, test.room)
        reset_peak()
        return [self._timed(ids)]

    def _timed(self, input_ids: Array) -> float:
        """Seconds until the next token is known."""
        began = time.perf_counter()
        self._engine.feed(input_ids).argmax(axis=-1)
        return time.perf_counter() - began

    def _ids(self, shape: tuple[int, ...]) -> Array:
        return np.random.default_rng(0).integers(0, self._engine.vocab_size, shape)

    def _take(self, before: int | None) -> None:
        after = device_used(self._device)
        if before is not None and after is not None:
            self._taken += after - before
