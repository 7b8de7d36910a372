"""What a benchmark found: plain data, in JSON as it is here."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np

from retnet_tools.bench.options import BenchOptions, Kind
from retnet_tools.machine import Machine
from retnet_tools.version import __version__

SCHEMA_VERSION = 3


@dataclass(frozen=True)
class BenchRow:
    """One test of one implementation on one number of threads.

    A ratio to something measured beside it is taken in each repetition; the row has the median of these ratios.

    Attributes:
        implementation: `retnet`, or one of the alternatives.
        test: name of the test; its kind, tokens of each sequence, depth and batch follow.
        threads: None where the runtime chose.
        device: that it really ran on.
        quantization: of the matrices; None for floats.
        chunk_size: tokens of a prompt that are read at once; None where it is read whole, and when decoding.
        cuda_graph: whether steps were replayed as CUDA graphs; None on the CPU, in torch and for prompts.
        tokens_per_second: of all sequences together, mean over repetitions.
        tokens_per_second_std: sample standard deviation over repetitions; None for one.
        ms_per_token_p50, ms_per_token_p99: a step, over all steps of all repetitions; for a prompt its time divided by
            its tokens, over repetitions.
        ms_to_first_token: of a prompt, median; None when decoding.
        bytes_per_token: what a token must move (`retnet_tools.bench.traffic`); a step moves `batch` times
            that.
        read_bandwidth: bytes a second that the device reads (a GPU: copies, read and written), measured before and
            after each repetition, median.
        floor_share: bytes_per_token / (seconds a token * read bandwidth) of each repetition, its median step against
            the bandwidth beside it, median over repetitions: 1 is as fast as memory allows. A model that fits into a
            cache can be faster.
        flops_per_token: of a prompt; None when decoding.
        product_rate: floating-point operations a second of a measured matrix product, the faster of those before and
            after each repetition, median; None when decoding.
        product_share: flops_per_token * tokens a second / product_rate of each repetition, median.
        state_bytes_per_sequence: states, or the KV cache with its last token; computed, one set of buffers.
        state_buffers: how many sets of them the implementation holds at once.
        memory_per_sequence: bytes that a sequence more in the batch took of the memory in use (GPU memory, else
            resident), measured; None where one batch ran.
        peak_resident_bytes: of the process that ran this implementation alone, highest over repetitions.
        device_bytes: of GPU memory that it held, weights and what it kept of smaller tests included; None on the CPU.
        retnet_speedup: how many times as many tokens a second RetNet gave, median over repetitions side by side; None
            for RetNet, and where they never ran side by side.
        repetitions: tokens a second of each, each in a process of its own.
        ms_medians: the median step of each, or ms a token of its prompt.
        bandwidths, product_rates: measured beside each; no product_rates when decoding.
        made_again: the repetitions, counted from 0, that deviated and are of a second or later time.
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
    chunk_size: int | None
    cuda_graph: bool | None
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
    state_buffers: int
    memory_per_sequence: float | None
    peak_resident_bytes: int | None
    device_bytes: int | None
    retnet_speedup: float | None
    repetitions: tuple[float, ...]
    ms_medians: tuple[float, ...]
    bandwidths: tuple[float, ...]
    product_rates: tuple[float, ...]
    made_again: tuple[int, ...] = ()


@dataclass(frozen=True)
class SkippedTest:
    """A test that an implementation could not run, and why.

    Attributes:
        repetitions: that it ran before; with one or more of them it has a row.
    """

    implementation: str
    test: str
    batch: int
    threads: int | None
    reason: str
    repetitions: int


@dataclass(frozen=True)
class ModelSummary:
    """The measured RetNet.

    Attributes:
        weight_bytes: that a step reads, by its configuration and types.
        weight_bytes_in_file: the same by the tensors of weights.data that the step graph reads whole.
        last_cache_bytes: of the cores that the process may use.
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
        largest_share: the largest difference within that interval, as a part of a step at the first position.
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
    largest_share: float
    equal: bool


@dataclass(frozen=True)
class OperatorTime:
    """An operator in a profile: ms and calls of one step, and its share of the step."""

    operator: str
    calls: float
    ms: float
    share: float


@dataclass(frozen=True)
class StepProfile:
    """Where the time of a step goes, while ONNX Runtime notes it down, which takes time of its own.

    Attributes:
        test, batch, threads: the case that was profiled.
        device: where; on `cuda` times are those of launching kernels, one by one.
        ms: a whole step, mean.
        outside_ms: of it that no operator accounts for.
        operators: most time first.
    """

    test: str
    batch: int
    threads: int | None
    device: str
    ms: float
    outside_ms: float
    operators: tuple[OperatorTime, ...]


@dataclass(frozen=True)
class BenchReport:
    """All of a run.

    Attributes:
        device: `cpu` or `cuda`.
        device_name: of a GPU.
    """

    model: ModelSummary
    machine: Machine
    options: BenchOptions
    device: str
    device_name: str | None
    rows: tuple[BenchRow, ...]
    skipped: tuple[SkippedTest, ...]
    flat: Flatness | None = None
    profile: StepProfile | None = None


def benchmark_document(report: BenchReport) -> dict[str, Any]:
    """The JSON document of `retnet-tools bench`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "retnet_tools": __version__,
        "libraries": libraries(),
        "quick": report.options.quick,
        **asdict(report),
    }


def libraries() -> dict[str, str]:
    """Versions of what is in use, onnxruntime under the name of the package that was imported."""
    import onnxruntime
    from onnxruntime.capi import build_and_package_info

    # Several packages bring a folder of this name, and what is installed need not be what comes first on the path.
    found = {build_and_package_info.package_name: onnxruntime.__version__, "numpy": np.__version__}
    with suppress(metadata.PackageNotFoundError):
        found["torch"] = metadata.version("torch")
    return found
