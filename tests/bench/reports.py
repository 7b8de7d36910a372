"""Reports with made-up figures, for tests of what shows them."""

from __future__ import annotations

from retnet_tools.bench.options import BenchOptions, Case
from retnet_tools.bench.results import (
    BenchReport,
    BenchRow,
    Flatness,
    ModelSummary,
    OperatorTime,
    PlacedPosition,
    SkippedTest,
    StepProfile,
)
from retnet_tools.bench.rows import Observed, Repetition, Sample, Subject, make_row
from retnet_tools.bench.traffic import retnet_traffic
from retnet_tools.machine import Machine
from tests.helpers import BASE

TRAFFIC = retnet_traffic(BASE, "float32", None, "float32", 128)


def subject(name: str) -> Subject:
    return Subject(name, "float32", None, "fused", TRAFFIC, {"prefill": 2, "decode": 1})


def observed(seconds: float, test: Case, repetitions: int = 3, memory: int = 300_000_000) -> Observed:
    """Repetitions of steps or prompts that take 0.9, 1, 1.1 times as long."""
    count = test.tokens if test.kind == "decode" else 1
    factors, peaks = [0.9, 1.0, 1.1], [memory // 3, None, memory]
    rates = [1e11, 2e11, 1e11] if test.kind == "prefill" else [None] * 3
    return {
        i: Repetition(Sample((seconds * factors[i],) * count, peaks[i], None, "cpu", None), (i + 1) * 1e9, rates[i])
        for i in range(repetitions)
    }


def row(name: str, test: Case, seconds: float = 0.01, retnet: float = 0.01, repetitions: int = 3) -> BenchRow:
    """A row of an implementation that takes `seconds` where RetNet takes `retnet`."""
    beside = None if name == "retnet" else observed(retnet, test, repetitions)
    return make_row(subject(name), test, 2, observed(seconds, test, repetitions), beside)


def report(rows: list[BenchRow], *, flat: bool = False, profile: bool = False) -> BenchReport:
    """A report of these rows."""
    positions = tuple(PlacedPosition(10**n, 10.0 + n / 100, 0.1, n * 1e-5, 12.0) for n in (3, 4, 5, 6))
    reason = "it needs 900.0 GB beside its weights, and 1.0 GB are free"
    operators = (OperatorTime("MatMulNBits", 97.0, 30.0, 0.75), OperatorTime("Mul", 3.0, 1.0, 0.025))
    return BenchReport(
        model=ModelSummary("1.3b", 10**9, "float32", "int8 in 128s", "fused", "float32", 10**7, 10**9, 10**9, 1 << 25),
        machine=Machine("Some processor", 2, 24 << 30, "Linux 6"),
        options=BenchOptions(repetitions=3),
        device="cpu",
        device_name=None,
        rows=tuple(rows),
        skipped=(SkippedTest("transformer", "tg8 @ d32768", 64, 2, reason, 0),),
        flat=Flatness(positions, 5, 0.01, -0.01, 0.03, 0.03, -0.03, 0.09, 0.009, True) if flat else None,
        profile=StepProfile("tg16", 1, 2, "cpu", 40.0, 9.0, operators) if profile else None,
    )


GRID = [
    row(name, Case("decode", 8, depth, batch), seconds=0.01 * (1 + (depth / 512 if name != "retnet" else 0)))
    for depth in (0, 512, 2048)
    for batch in (1, 8)
    for name in ("retnet", "transformer")
]
