"""What a measuring process does for its caller: times steps and prompts, and watches its memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from retnet_tools.bench.engines import Engine, RetNetEngine
from retnet_tools.bench.memory import device_free, device_used
from retnet_tools.bench.options import WARM_UP_STEPS, Case
from retnet_tools.bench.resident import anonymous_resident, peak_resident, reset_peak, trim
from retnet_tools.bench.rows import Sample
from retnet_tools.bench.specs import EngineSpec
from retnet_tools.machine import available_memory
from retnet_tools.runtime.providers import Device, check_device
from retnet_tools.weights import Array


class Measurements:
    """Opens an implementation and measures it.

    Only one measuring process works at a time. So what a GPU has less after this one worked than before, this one
    holds, and what others took in between does not count.
    """

    def __init__(self, engine: Callable[[EngineSpec], Engine], spec: EngineSpec) -> None:
        # It loads the CUDA libraries, which are asked for the memory.
        check_device(spec.device)
        before = device_used(spec.device)
        self._engine = engine(spec)
        self._device = self._engine.device
        self._held = self._since(before, 0)
        self._held_at_first, self._anonymous_at_first = self._held, anonymous_resident()

    def device(self) -> Device:
        """Where the implementation really runs."""
        return self._device

    def room(self) -> int | None:
        """Bytes that a test can have: those that are free, and those that this process kept of earlier tests.

        None where that is not known.
        """
        if self._device.kind == "cpu":
            trim()
            free, now, first = available_memory(), anonymous_resident(), self._anonymous_at_first
        else:
            free, now, first = device_free(self._device), self._held, self._held_at_first
        kept = 0 if now is None or first is None else max(0, now - first)
        return None if free is None else free + kept

    def run(self, test: Case) -> Sample:
        """One repetition: the context is placed, warmed up, and the test timed, logits fetched after every call."""
        before, held = device_used(self._device), self._held
        try:
            seconds, reset = self._decode(test) if test.kind == "decode" else self._prefill(test)
            peak = peak_resident() if reset else None
            at_test = self._since(before, held)
        finally:
            self._engine.release()
            self._held = self._since(before, held)
        captured = self._engine.captured if test.kind == "decode" else None
        return Sample(tuple(seconds), peak, at_test, self._device.kind, captured)

    def logits_at(self, positions: Array, input_ids: Array) -> Array:
        """Logits `[B, vocab]` of one token `[B]` for rows whose random states stand at these positions `[B]`."""
        self._engine.place(len(positions), positions, int(positions.max()) + 1)
        logits = self._engine.feed(input_ids[:, None])
        self._engine.release()
        return logits

    def profile(self, test: Case) -> Path:
        """Run a test in a session that profiles, and write the profile; of RetNet only."""
        assert isinstance(self._engine, RetNetEngine)
        self._decode(test)
        return self._engine.end_profile()

    def _decode(self, test: Case) -> tuple[list[float], bool]:
        ids = self._ids((WARM_UP_STEPS + test.tokens, test.batch, 1))
        self._engine.place(test.batch, test.depth, test.room)
        reset = reset_peak()
        seconds = [self._timed(step) for step in ids]
        return seconds[WARM_UP_STEPS:], reset

    def _prefill(self, test: Case) -> tuple[list[float], bool]:
        ids = self._ids((test.batch, test.tokens))
        # Every shape that the test will run is run before: a whole prompt, or a chunk and the last, shorter one.
        chunk = self._engine.prompt_at_once
        warm_up = test.tokens if chunk is None or test.tokens <= chunk else chunk + test.tokens % chunk
        self._engine.place(test.batch, test.depth, test.room)
        self._timed(ids[:, :warm_up])
        self._engine.release()
        self._engine.place(test.batch, test.depth, test.room)
        reset = reset_peak()
        return [self._timed(ids)], reset

    def _timed(self, input_ids: Array) -> float:
        """Seconds until the next token is known."""
        began = time.perf_counter()
        self._engine.feed(input_ids).argmax(axis=-1)
        return time.perf_counter() - began

    def _ids(self, shape: tuple[int, ...]) -> Array:
        return np.random.default_rng(0).integers(0, self._engine.vocab_size, shape)

    def _since(self, before: int | None, held: int | None) -> int | None:
        """What this process holds of a GPU, where it held `held` while `before` was in use in all."""
        now = device_used(self._device)
        return None if now is None or before is None or held is None else held + now - before
