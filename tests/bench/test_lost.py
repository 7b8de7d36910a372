"""A process that is really killed in a test costs that test and no other."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from retnet_tools.bench.floor import ProductShape
from retnet_tools.bench.implementations import Implementation
from retnet_tools.bench.models import Precision, write_probes
from retnet_tools.bench.options import Case
from retnet_tools.bench.rounds import Round, Setting
from retnet_tools.runtime.providers import Device
from tests.bench.inline import measure_inline
from tests.bench.reports import subject

CPU = Device("cpu")


@dataclass(frozen=True)
class MortalSpec:
    engine: ClassVar[str] = "tests.bench.test_lost:Mortal"
    device: Device = CPU
    threads: int | None = 1


class Mortal:
    """Killed by two sequences at once, as by a system without memory."""

    device, vocab_size, captured, prompt_at_once = CPU, 61, None, None

    def __init__(self, spec: MortalSpec) -> None: ...

    def place(self, batch: int, depth: int, room: int) -> None: ...

    def feed(self, input_ids: np.ndarray) -> np.ndarray:
        if len(input_ids) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros((len(input_ids), 61))

    def release(self) -> None: ...


def test_the_next_test_runs_in_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_inline(monkeypatch, probes_only=True)
    shape = ProductShape(64, 64, "float32")
    probes = write_probes(shape, Precision("float32", None, "fused"), tmp_path / "probes")
    retnet = Implementation(subject("retnet"), lambda threads, kind: MortalSpec(), weights=lambda kind: 0)
    tests = [Case("decode", 3, 0, batch) for batch in (1, 2, 4)]
    round = Round([retnet], tests, 1, Setting(1, probes, shape, quick=True))
    round.run(lambda *_: None, 0, 3)
    assert [(row.batch, len(row.repetitions)) for row in round.rows()] == [(1, 1), (4, 1)]
    (skip,) = round.skipped
    assert (skip.batch, skip.repetitions) == (2, 0)
    assert "ended with signal SIGKILL; it was probably out of memory" in skip.reason
