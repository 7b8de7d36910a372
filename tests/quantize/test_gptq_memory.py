"""GPTQ holds a block of the model, not the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from retnet_tools.formats.canonical import write_canonical
from retnet_tools.paper import paper_config
from retnet_tools.random_weights import RandomWeights
from retnet_tools.weights import canonical_shapes
from tests.helpers import PEAK_RESIDENT

# 15 MB a layer; K of 1024 makes statistics of 8 MB, of which some are held.
LAYERS = 8
CONFIG = paper_config(vocab_size=256, hidden_size=512, value_dim=1024, ffn_dim=1024, num_layers=LAYERS, num_heads=4)
# Each thread of the libraries has buffers of its own, and each of ours a part of the heap.
ONE_THREAD = {
    **os.environ,
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX"), "1"),
}
RUN = (
    PEAK_RESIDENT
    + """
import sys
from pathlib import Path
from retnet_tools.formats import open_checkpoint
from retnet_tools.quantize.gptq_run import Gptq
from tests.helpers import random_tokens
from tests.quantize.calibrated import make_task
checkpoint = open_checkpoint(Path(sys.argv[1]))
peaks = []
def note(what, done, total):
    peaks.append(peak_resident())
sequences = random_tokens(checkpoint.config, 1, 256, 7)
Gptq(make_task(checkpoint.config, checkpoint.weights, Path(sys.argv[2]), sequences=sequences, progress=note))
print(peaks[0], peaks[5], peaks[-1])
"""
)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    weights = RandomWeights(canonical_shapes(CONFIG))
    files = write_canonical(tmp_path / "model", CONFIG, weights)
    size = sum(file.stat().st_size for file in files)
    assert size > 1e8
    growths = []
    # One peak in ten is up to 16 MB higher, by where the heap had room; what a layer leaves is there each time.
    for turn in range(3):
        command = [sys.executable, "-c", RUN, str(tmp_path / "model"), str(tmp_path / f"work{turn}")]
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=ONE_THREAD)
        start, early, last = map(int, run.stdout.split())
        print(start, early, last, size)
        assert last - start < size
        # The fourth block is the first at which all that a block needs has been there.
        growths.append(last - early)
        if growths[-1] < size / 10:
            return
    pytest.fail(f"memory grew by {growths} bytes over the last layers")


FEEDBACK = (
    PEAK_RESIDENT
    + """
import numpy as np
from retnet_tools.quantize.gptq import ErrorFeedback, InputStatistics
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def made(columns):
    statistics, rng = InputStatistics(columns), np.random.default_rng(0)
    x = rng.standard_normal((256, columns), dtype=np.float32)
    statistics.add(x, x + rng.standard_normal(x.shape, dtype=np.float32))
    return statistics
ErrorFeedback(made(64), "warm-up")
K = 2500
statistics = made(K)
start = resident() - 2 * 8 * K * K
feedback = ErrorFeedback(statistics, "x")
print((peak_resident() - start) / (8 * K * K), (resident() - start) / (8 * K * K))
"""
)


@pytest.mark.slow
def test_what_rounds_an_input_takes_three_square_matrices_at_most_and_two_after() -> None:
    command = [sys.executable, "-c", FEEDBACK]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=ONE_THREAD)
    peak, after = map(float, run.stdout.split())
    print(peak, after)
    assert peak < 3.3
    assert after < 2.2
