"""From what was seen in each repetition to the rows of a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from retnet_tools.bench.options import Case, Kind
from retnet_tools.bench.results import BenchRow
from retnet_tools.bench.traffic import Traffic
from retnet_tools.weights import Array


@dataclass(frozen=True)
class Sample:
    """One repetition of a test, as the process that ran it saw it.

    Attributes:
        seconds: of each step, or of the whole prompt.
        peak_resident_bytes: of the process while it ran, its states in place; None where that is not known.
        device_bytes: of GPU memory that the process held then, weights included; None on the CPU.
        device: the kind of device that it really ran on.
        cuda_graph: whether its steps were replayed as CUDA graphs; None on the CPU and for prompts.
    """

    seconds: tuple[float, ...]
    peak_resident_bytes: int | None
    device_bytes: int | None
    device: str
    cuda_graph: bool | None


@dataclass(frozen=True)
class Repetition:
    """A sample, and what was measured of the device beside it: bytes and floating-point operations a second."""

    sample: Sample
    bandwidth: float
    product_rate: float | None


@dataclass(frozen=True)
class Subject:
    """What is the same in all rows of an implementation.

    Attributes:
        buffers: how many times it holds the states of a batch at once, for each kind of test that it runs.
    """

    implementation: str
    dtype: str
    quantization: str | None
    ops: str
    traffic: Traffic
    buffers: Mapping[Kind, int]


Observed = Mapping[int, Repetition]
"""Repetitions by their number."""
DEVIATING = 0.1
"""Of the median of repetitions: something else ran on the machine."""


def off_median(values: Sequence[float] | Array, least: float = 0.0) -> list[int]:
    """Where values differ from their median by more than `DEVIATING` of it, and by more than `least`."""
    median = np.median(values)
    return [i for i, value in enumerate(values) if abs(value - median) > max(DEVIATING * median, least)]


def deviating(test: Case, seen: Observed) -> list[int]:
    """The repetitions whose tokens a second differ from their median by more than `DEVIATING` of it."""
    repetitions = list(seen)
    return [repetitions[i] for i in off_median(_rates(test, seen))]


def make_row(
    subject: Subject,
    test: Case,
    threads: int | None,
    seen: Observed,
    retnet: Observed | None,
    made_again: Iterable[int] = (),
) -> BenchRow:
    """The row of a test.

    Args:
        seen: at least one repetition.
        retnet: what was seen of RetNet beside it; None for RetNet itself.
        made_again: the repetitions that are of a second or later time.
    """
    samples = [repetition.sample for repetition in seen.values()]
    rates, traffic, decode = _rates(test, seen), subject.traffic, test.kind == "decode"
    per_token = [1e3 * np.array(sample.seconds) / (1 if decode else test.tokens) for sample in samples]
    medians = np.array([np.median(ms) for ms in per_token])
    bandwidths = np.array([repetition.bandwidth for repetition in seen.values()])
    products = np.array([r.product_rate for r in seen.values() if r.product_rate is not None])
    if decode:
        # The context grows while it decodes: its middle counts.
        moved = traffic.decode_bytes(test.batch, test.room - (test.tokens - 1) / 2 - 1)
    else:
        moved = traffic.prefill_bytes(test.batch, test.tokens, test.depth)
    flops = None if decode else traffic.prefill_flops(test.tokens, test.depth)
    everything = np.concatenate(per_token)
    return BenchRow(
        implementation=subject.implementation,
        test=test.name,
        kind=test.kind,
        tokens=test.tokens,
        depth=test.depth,
        batch=test.batch,
        threads=threads,
        device=" and ".join(sorted({sample.device for sample in samples})),
        dtype=subject.dtype,
        quantization=subject.quantization,
        ops=subject.ops,
        parameters=traffic.parameters,
        chunk_size=None if decode else traffic.chunk_size,
        cuda_graph=_common([sample.cuda_graph for sample in samples]),
        tokens_per_second=float(rates.mean()),
        tokens_per_second_std=float(rates.std(ddof=1)) if len(rates) > 1 else None,
        ms_per_token_p50=float(np.percentile(everything, 50)),
        ms_per_token_p99=float(np.percentile(everything, 99)),
        ms_to_first_token=None if decode else float(test.tokens * np.median(everything)),
        bytes_per_token=moved,
        read_bandwidth=float(np.median(bandwidths)),
        floor_share=float(np.median(1e3 * moved * test.batch / medians / bandwidths)),
        flops_per_token=flops,
        product_rate=float(np.median(products)) if len(products) else None,
        product_share=None if flops is None or not len(products) else float(np.median(flops * rates / products)),
        state_bytes_per_sequence=traffic.state_bytes(test.depth + test.tokens),
        state_buffers=subject.buffers[test.kind],
        memory_per_sequence=None,
        peak_resident_bytes=_highest([sample.peak_resident_bytes for sample in samples]),
        device_bytes=_highest([sample.device_bytes for sample in samples]),
        retnet_speedup=None if retnet is None else _speedup(test, seen, retnet),
        repetitions=tuple(map(float, rates)),
        ms_medians=tuple(map(float, medians)),
        bandwidths=tuple(map(float, bandwidths)),
        product_rates=tuple(map(float, products)),
        made_again=tuple(sorted(made_again)),
    )


def with_measured_memory(rows: Iterable[BenchRow]) -> list[BenchRow]:
    """The rows, with what each sequence of a batch added to the memory in use, where several batches ran.

    The slope of memory against the batch by least squares, of rows that differ in nothing else: of GPU memory, else of
    the peak that was resident.
    """
    rows = list(rows)
    alike: dict[tuple[object, ...], list[BenchRow]] = {}
    for row in rows:
        alike.setdefault(_all_but_batch(row), []).append(row)
    slopes = {key: _slope(group) for key, group in alike.items()}
    return [dataclasses.replace(row, memory_per_sequence=slopes[_all_but_batch(row)]) for row in rows]


def memory_in_use(row: BenchRow) -> int | None:
    """GPU memory where it ran on one, else what was resident."""
    return row.peak_resident_bytes if row.device_bytes is None else row.device_bytes


def _all_but_batch(row: BenchRow) -> tuple[object, ...]:
    return row.implementation, row.test, row.threads


def _slope(rows: Iterable[BenchRow]) -> float | None:
    known = {row.batch: memory for row in rows if (memory := memory_in_use(row)) is not None}
    if len(known) < 2:
        return None
    slope, _ = np.polyfit(list(known), list(known.values()), 1)
    return float(slope)


def _rates(test: Case, seen: Observed) -> Array:
    """Tokens a second of each repetition, `[R]`."""
    seconds = np.array([sum(repetition.sample.seconds) for repetition in seen.values()])
    rates: Array = test.batch * test.tokens / seconds
    return rates


def _speedup(test: Case, seen: Observed, retnet: Observed) -> float | None:
    """Of the repetitions that both ran, side by side; None where there is none."""
    both = sorted(seen.keys() & retnet.keys())
    if not both:
        return None
    ours, theirs = (_rates(test, {i: side[i] for i in both}) for side in (retnet, seen))
    return float(np.median(ours / theirs))


def _highest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _common(values: list[bool | None]) -> bool | None:
    """False where one is: a row of captured steps has no others in it."""
    return None if None in values else all(values)
