"""What a benchmark found: plain data, in JSON as it is here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np

from retnet_tools.machine import Machine
from retnet_tools.reports.benchmark.options import RETNET, Case, Kind
from retnet_tools.reports.benchmark.traffic import Traffic

SCHEMA_VERSION = 2
_LIBRARIES = ("onnxruntime-gpu", "onnxruntime", "numpy", "torch")


@dataclass(frozen=True)
class BenchRow:
    """One test of one implementation on one number of threads.

    Attributes:
        implementation: `retnet`, or one of the alternatives.
        test: name of the test; its kind, tokens of each sequence, depth and batch follow.
        threads: None where the runtime chose.
        quantization: of the matrices; None for floats.
        tokens_per_second: of all sequences together, mean over repetitions.
        tokens_per_second_std: sample standard deviation over repetitions; None for one.
        ms_per_token_p50, ms_per_token_p99: a step, over all steps of all repetitions; for a prompt its time divided by
            its tokens, over repetitions.
        ms_to_first_token: of a prompt, median; None when decoding.
        bytes_per_token: what a token must move (`retnet_tools.reports.benchmark.traffic`); a step moves `batch` times
            that.
        read_bandwidth: bytes a second that the device reads, measured before and after each repetition, median.
        floor_share: bytes_per_token / (seconds a token * read bandwidth) of each repetition, its median step against
            the bandwidth beside it, median over repetitions: 1 is as fast as memory allows. A model that fits into a
            cache can be faster.
        flops_per_token: of a prompt; None when decoding.
        product_rate: floating-point operations a second of a measured matrix product, best; None when decoding.
        product_share: flops_per_token * tokens_per_second / product_rate.
        state_bytes_per_sequence: states, or the KV cache with its last token.
        peak_resident_bytes: of the process that ran this implementation alone, highest over repetitions.
        device_bytes: of GPU memory that it had taken; None on the CPU.
        retnet_speedup: how many times as many tokens a second RetNet gave, median over repetitions side by side; None
            for RetNet.
        repetitions: tokens a second of each.
    """

    implementation: str
    test: str
    kind: Kind
    tokens: int
    depth: int
    batch: int
    threads: int | None
    device: str
    dtype: str
    quantization: str | None
    ops: str
    parameters: int
    tokens_per_second: float
    tokens_per_second_std: float | None
    ms_per_token_p50: float
    ms_per_token_p99: float
    ms_to_first_token: float | None
    bytes_per_token: float
    read_bandwidth: float
    floor_share: float
    flops_per_token: float | None
    product_rate: float | None
    product_share: float | None
    state_bytes_per_sequence: int
    peak_resident_bytes: int | None
    device_bytes: int | None
    retnet_speedup: float | None
    repetitions: tuple[float, ...]


@dataclass(frozen=True)
class SkippedTest:
    """A test that an implementation could not run, and why."""

    implementation: str
    test: str
    batch: int
    threads: int | None
    reason: str


@dataclass(frozen=True)
class ModelSummary:
    """The measured RetNet.

    Attributes:
        weight_bytes: that a step reads, by its configuration and types.
        weight_bytes_in_file: the same by the tensors of weights.data that the step graph reads whole.
        last_cache_bytes: of the processor.
    """

    name: str
    parameters: int
    dtype: str
    quantization: str | None
    ops: str
    state_dtype: str
    state_bytes_per_sequence: int
    weight_bytes: int
    weight_bytes_in_file: int
    last_cache_bytes: int

    @property
    def in_cache(self) -> bool:
        """Whether a step's weights may stay in the processor's cache, so that memory does not limit it."""
        return self.weight_bytes < self.last_cache_bytes


@dataclass(frozen=True)
class PlacedPosition:
    """Decoding at one position.

    Attributes:
        ms_per_token: mean over repetitions of the median step.
        ms_per_token_std: over repetitions.
        max_abs: largest difference of a logit from float64; None where there are no float weights to compute it with.
        logits_scale: the largest logit there.
    """

    position: int
    ms_per_token: float
    ms_per_token_std: float
    max_abs: float | None
    logits_scale: float


@dataclass(frozen=True)
class Flatness:
    """Latency against position: ms = a_r + slope log10(position) by least squares, a_r of each repetition.

    Attributes:
        slope: ms for ten times the position.
        slope_low, slope_high: its 95% confidence interval (Student's t).
        difference: ms from the first position to the last, by the slope.
        difference_low, difference_high: its 95% confidence interval.
        equal: whether that interval holds 0.
    """

    positions: tuple[PlacedPosition, ...]
    repetitions: int
    slope: float
    slope_low: float
    slope_high: float
    difference: float
    difference_low: float
    difference_high: float
    equal: bool


@dataclass(frozen=True)
class OperatorTime:
    """An operator in a profile: ms and calls of one step, and its share of all operators' time."""

    operator: str
    calls: float
    ms: float
    share: float


@dataclass(frozen=True)
class BenchReport:
    """All of a run.

    Attributes:
        device: `cpu` or `cuda`.
        device_name: of a GPU.
    """

    model: ModelSummary
    machine: Machine
    device: str
    device_name: str | None
    rows: tuple[BenchRow, ...]
    skipped: tuple[SkippedTest, ...]
    flat: Flatness | None = None
    profile: tuple[OperatorTime, ...] | None = None


@dataclass(frozen=True)
class Observed:
    """What was seen of one implementation in one test.

    Attributes:
        seconds: of each repetition: of each step, or of the prompt.
        bandwidths, product_rates: of the device beside each repetition.
    """

    seconds: list[tuple[float, ...]]
    peaks: list[int | None]
    device_bytes: list[int | None]
    bandwidths: list[float]
    product_rates: list[float]

    def rates(self, test: Case) -> Any:
        """Tokens a second of each repetition, `[R]`."""
        return test.batch * test.tokens / np.array([sum(seconds) for seconds in self.seconds])

    def floor_share(self, test: Case, bytes_per_token: float) -> float:
        """Of the bandwidth beside each repetition, what its median step or its prompt took; median."""
        steps = 1 if test.kind == "decode" else test.tokens
        seconds = np.array([np.median(seconds) for seconds in self.seconds])
        return float(np.median(bytes_per_token * test.batch * steps / seconds / np.array(self.bandwidths)))


@dataclass(frozen=True)
class Subject:
    """What is the same in all rows of an implementation."""

    implementation: str
    device: str
    dtype: str
    quantization: str | None
    ops: str
    traffic: Traffic


def make_row(subject: Subject, test: Case, threads: int | None, seen: Observed, retnet: Observed | None) -> BenchRow:
    """The row of a test.

    Args:
        retnet: what was seen of RetNet beside it; None for RetNet itself.
    """
    rates, traffic, decode = seen.rates(test), subject.traffic, test.kind == "decode"
    per_token = 1e3 * np.array(seen.seconds) / (1 if decode else test.tokens)
    rate = float(rates.mean())
    if decode:
        # The context grows while it decodes: its middle counts.
        moved = traffic.decode_bytes(test.batch, test.room - (test.tokens - 1) / 2 - 1)
    else:
        moved = traffic.prefill_bytes(test.batch, test.tokens, test.depth)
    flops = None if decode else traffic.prefill_flops(test.tokens, test.depth)
    products = max(seen.product_rates, default=None)
    return BenchRow(
        implementation=subject.implementation,
        test=test.name,
        kind=test.kind,
        tokens=test.tokens,
        depth=test.depth,
        batch=test.batch,
        threads=threads,
        device=subject.device,
        dtype=subject.dtype,
        quantization=subject.quantization,
        ops=subject.ops,
        parameters=traffic.parameters,
        tokens_per_second=rate,
        tokens_per_second_std=float(rates.std(ddof=1)) if len(rates) > 1 else None,
        ms_per_token_p50=float(np.percentile(per_token, 50)),
        ms_per_token_p99=float(np.percentile(per_token, 99)),
        ms_to_first_token=None if decode else float(1e3 * np.median(np.array(seen.seconds))),
        bytes_per_token=moved,
        read_bandwidth=float(np.median(seen.bandwidths)),
        floor_share=seen.floor_share(test, moved),
        flops_per_token=flops,
        product_rate=products,
        product_share=None if flops is None or products is None else flops * rate / products,
        state_bytes_per_sequence=traffic.state_bytes(test.depth + test.tokens),
        peak_resident_bytes=max((p for p in seen.peaks if p is not None), default=None),
        device_bytes=max((d for d in seen.device_bytes if d is not None), default=None),
        retnet_speedup=None if retnet is None else float(np.median(retnet.rates(test) / rates)),
        repetitions=tuple(map(float, rates)),
    )


def benchmark_document(report: BenchReport) -> dict[str, Any]:
    """The JSON document of `retnet-tools bench`."""
    libraries = {}
    for name in _LIBRARIES:
        try:
            libraries[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "schema_version": SCHEMA_VERSION,
        "retnet_tools": metadata.version("retnet-tools"),
        "libraries": libraries,
        **asdict(report),
    }


def is_retnet(row: BenchRow) -> bool:
    """Whether a row is of RetNet and not of an alternative."""
    return row.implementation == RETNET
