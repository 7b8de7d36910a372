"""Whether decoding is as fast, and as right, at a million tokens as at a thousand."""

from __future__ import annotations

import math

import numpy as np

from retnet_tools.bench.engines import placed_states
from retnet_tools.bench.models import Model
from retnet_tools.bench.options import BenchOptions, Case
from retnet_tools.bench.results import Flatness, PlacedPosition
from retnet_tools.bench.specs import RetNetSpec
from retnet_tools.bench.torch_decoder import reference_logits
from retnet_tools.bench.worker import Worker
from retnet_tools.evaluate.estimates import student_t
from retnet_tools.graph.contract import state_scale
from retnet_tools.progress import Progress
from retnet_tools.runtime.providers import Device
from retnet_tools.weights import Array

POSITIONS = (1_000, 10_000, 100_000, 1_000_000)


def measure_flat(model: Model, options: BenchOptions, device: Device, progress: Progress) -> Flatness:
    """Decode one sequence at each of `POSITIONS`, in another order and a new process in each repetition.

    Latency is the median step. States are random and the same at every position. Correctness: the logits of one token
    at each position, against the recurrent form in float64 from the same states and the float weights; with quantized
    weights that difference is the quantization's too.

    Raises:
        ProviderError: the device cannot be had.
    """
    tests = [Case("decode", max(options.tokens), position, 1) for position in POSITIONS]
    latencies = np.zeros((options.repetitions, len(tests)))
    order, threads = np.random.default_rng(0), options.threads[0]
    positions = np.array(POSITIONS, dtype=np.int64)
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, len(positions))
    spec = RetNetSpec(model.folder, device, threads, options.chunk_size, cuda_graph=options.cuda_graph)
    for repetition in range(options.repetitions):
        progress("loading retnet", repetition, options.repetitions)
        with Worker("retnet", spec) as worker:
            for i in order.permutation(len(tests)):
                progress(f"position {tests[i].depth}", repetition, options.repetitions)
                latencies[repetition, i] = 1e3 * np.median(worker.call("run", tests[i]).seconds)
            logits = worker.call("logits_at", positions, ids)
    progress("float64 reference", 0, 1)
    return _flatness(latencies, logits, _differences(model, positions, ids, logits))


def fit_slope(x: Array, latencies: Array) -> tuple[float, float]:
    """Slope of latencies `[R, P]` against x `[P]`, with an intercept for each repetition, and half of its 95% interval.

    b = sum (x - mean x) y / sum (x - mean x)^2 over all repetitions; R P - R - 1 degrees of freedom.
    """
    repetitions, count = latencies.shape
    centred = np.tile(x - x.mean(), (repetitions, 1))
    y = latencies - latencies.mean(axis=1, keepdims=True)
    square = float((centred**2).sum())
    slope = float((centred * y).sum()) / square
    degrees = repetitions * count - repetitions - 1
    variance = float(((y - slope * centred) ** 2).sum()) / degrees
    return slope, student_t(0.975, degrees) * math.sqrt(variance / square)


def _differences(model: Model, positions: Array, ids: Array, logits: Array) -> list[float | None]:
    if model.weights is None:
        return [None] * len(positions)
    # A graph's state is c S, c = 1 but for float16.
    scale = np.array(state_scale(model.config, model.state_dtype)).reshape(-1, 1, 1)
    states = [state / scale for state in placed_states(model.config, len(positions), model.state_dtype)]
    exact = reference_logits(model.config, model.weights, ids, states, positions)
    return [float(difference) for difference in np.abs(logits - exact).max(axis=1)]


def _flatness(latencies: Array, logits: Array, differences: list[float | None]) -> Flatness:
    x = np.log10(POSITIONS)
    slope, half = fit_slope(x, latencies)
    span = float(x[-1] - x[0])
    return Flatness(
        positions=tuple(
            PlacedPosition(
                position=position,
                ms_per_token=float(latencies[:, i].mean()),
                ms_per_token_std=float(latencies[:, i].std(ddof=1)),
                max_abs=differences[i],
                logits_scale=float(np.abs(logits[i]).max()),
            )
            for i, position in enumerate(POSITIONS)
        ),
        repetitions=len(latencies),
        slope=slope,
        slope_low=slope - half,
        slope_high=slope + half,
        difference=slope * span,
        difference_low=(slope - half) * span,
        difference_high=(slope + half) * span,
        largest_share=(abs(slope) + half) * span / float(latencies[:, 0].mean()),
        equal=slope - half <= 0 <= slope + half,
    )
