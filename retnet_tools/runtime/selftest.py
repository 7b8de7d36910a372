"""A self-test of a few seconds: a small random RetNet is exported and run on a device, and judged by numpy in float64.

The model is the paper's (Eq. 8, 9): heads of 64 x 128 in two layers. A ragged batch of two is read as a prompt
and stepped on, far enough for a CUDA graph to be captured and replayed.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import RetNetToolsError
from retnet_tools.formats import Checkpoint
from retnet_tools.graph.export import plan_export, write_export
from retnet_tools.paper import paper_config
from retnet_tools.random_weights import RandomWeights
from retnet_tools.runtime.cuda_graphs import EAGER_STEPS
from retnet_tools.runtime.providers import Device
from retnet_tools.runtime.session import DecoderSession
from retnet_tools.weights import Array, WeightSource, canonical_shapes

CONFIG = paper_config(vocab_size=61, hidden_size=128, value_dim=256, ffn_dim=96, num_layers=2, num_heads=2)
PROMPTS = (7, 4)
STEPS = EAGER_STEPS + 4
TOLERANCE = 1e-3
"""Largest difference of logits of order 1 to 10 in float32; TF32 would be off by several times that."""


@dataclass(frozen=True)
class SelfTest:
    """What one device did.

    Attributes:
        prefill_error, step_error: largest absolute differences of logits; NaN where it did not run.
        eager_reason: why no CUDA graph was captured; None where one was.
        problem: why it failed; None where it passed.
    """

    device: str
    prefill_error: float
    step_error: float
    eager_reason: str | None
    seconds: float
    problem: str | None

    @property
    def passed(self) -> bool:
        """Whether the device computes what float64 says."""
        return self.problem is None


def run_selftest(devices: Sequence[Device], *, threads: int | None = 1) -> list[SelfTest]:
    """Test each device."""
    weights = RandomWeights(canonical_shapes(CONFIG))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (len(PROMPTS), max(PROMPTS) + STEPS))
    expected = float64_logits(CONFIG, weights, tokens)
    checkpoint = Checkpoint(Path("self-test"), "random", CONFIG, weights, [], [], [])
    found = []
    for device in devices:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="retnet-tools-") as scratch:
            folder = Path(scratch) / "export"
            plan = plan_export(checkpoint, dtype="float32", ops="fused", device=device.kind)
            write_export(plan, folder, force=False, progress=lambda count: None)
            found.append(_test(folder, device, threads, tokens, expected, began))
    return found


def _test(folder: Path, device: Device, threads: int | None, tokens: Array, expected: Array, began: float) -> SelfTest:
    prefill_error = step_error = math.nan
    reason = problem = None
    rows = np.arange(len(PROMPTS))
    try:
        session = DecoderSession(folder, device, threads)
        reason = session.eager_reason
        state = session.new_state(len(PROMPTS))
        logits = session.prefill(tokens[:, : max(PROMPTS)], state, lengths=PROMPTS)
        prefill_error = float(np.abs(logits - expected[rows, np.array(PROMPTS) - 1]).max())
        steps = []
        for _ in range(STEPS):
            place = state.position
            stepped = session.step(tokens[rows, place], state)
            assert stepped is not None
            steps.append(np.abs(stepped - expected[rows, place]).max())
        step_error = float(np.max(steps))
        worst = float(np.max([prefill_error, step_error]))
        # NaN is no number below the tolerance either.
        if not worst <= TOLERANCE:
            problem = f"logits are off by {worst:.2e}, more than {TOLERANCE:g}"
    except RetNetToolsError as error:
        problem = str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return SelfTest(str(device), prefill_error, step_error, reason, time.perf_counter() - began, problem)


def float64_logits(config: RetNetConfig, weights: WeightSource, tokens: Array) -> Array:
    """Logits `[B, T, vocab]` of the paper's architecture by the recurrence (Eq. 6), token by token in float64."""
    w = {name: weights.read(name).astype(np.float64) for name in weights.names()}
    return np.stack([_row(config, w, row) for row in tokens])


def _row(config: RetNetConfig, w: dict[str, Array], tokens: Array) -> Array:
    heads, gamma = config.num_heads, np.exp(np.array(config.decay))
    states = np.zeros((config.num_layers, heads, config.head_k_dim, config.head_v_dim))
    logits = []
    for n, token in enumerate(tokens):
        turn = np.exp(1j * n * np.array(config.rotary_frequencies))
        x = w["embedding.weight"][token]
        for i in range(config.num_layers):
            own = f"layers.{i}.retention"
            h = _rms(config, x) * w[f"{own}_norm.weight"]
            q, k, v, gate = (w[f"{own}.{part}_proj.weight"] @ h for part in ("q", "k", "v", "gate"))
            q, k = (_turned(part.reshape(heads, -1), turn) for part in (q, k))
            added = config.score_normalization.key_scale * k[:, :, None] * v.reshape(heads, 1, -1)
            states[i] = gamma[:, None, None] * states[i] + added
            o = np.einsum("hk,hkv->hv", q, states[i])
            o = o / np.sqrt((1 - gamma ** (n + 1)) / (1 - gamma))[:, None]
            y = _rms(config, o).reshape(-1) * gate / (1 + np.exp(-gate))
            x = x + w[f"{own}.out_proj.weight"] @ y
            own = f"layers.{i}.ffn"
            h = _rms(config, x) * w[f"{own}_norm.weight"]
            g = w[f"{own}.gate_proj.weight"] @ h
            g = g * 0.5 * (1 + np.array([math.erf(value / math.sqrt(2)) for value in g]))
            x = x + w[f"{own}.down_proj.weight"] @ (g * (w[f"{own}.up_proj.weight"] @ h))
        logits.append(w["lm_head.weight"] @ (_rms(config, x) * w["final_norm.weight"]))
    return np.stack(logits)


def _rms(config: RetNetConfig, x: Array) -> Array:
    """x over its root mean square along the last axis; head norm and block norms have one epsilon."""
    normed: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.block_norm.eps)
    return normed


def _turned(x: Array, turn: Array) -> Array:
    """Pairs of `[H, K]` as complex numbers, rotated."""
    pairs = (x[:, 0::2] + 1j * x[:, 1::2]) * turn
    return np.stack((pairs.real, pairs.imag), -1).reshape(x.shape)
