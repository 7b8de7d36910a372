"""Position tables: exact phases and powers of gamma for 16.7 million positions from small float32 tables.

A position is n = 4096 a + b. Computed in float64 and rounded once:

    e^(i n theta) = e^(i 4096 a theta) e^(i b theta)                                          (angle addition)
    sum_(i=0)^n gamma^i = sum_(i=0)^b gamma^i + gamma^(b+1) sum_(i=0)^(4096 a - 1) gamma^i    (positive terms only)

float32 `angle * position` is off by 0.02 rad at a million tokens; these are off by about 1e-7 at any position.
"""

from __future__ import annotations

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.graph.contract import POSITION_RADIX
from retnet_tools.weights import Array


def phase_tables(config: RetNetConfig) -> dict[str, Array]:
    """cos and sin of b theta (`low`) and 4096 a theta (`high`), each `[4096, K/2]` float32.

    `[4096, H*K/2]` where each head has frequencies of its own.
    """
    theta = np.array(config.rotary_frequencies)
    steps = np.arange(POSITION_RADIX, dtype=np.float64)[:, None]
    tables = {}
    for part, positions in (("low", steps), ("high", steps * POSITION_RADIX)):
        tables[f"positions.cos_{part}"] = np.cos(positions * theta).astype(np.float32)
        tables[f"positions.sin_{part}"] = np.sin(positions * theta).astype(np.float32)
    return tables


def log_decay(config: RetNetConfig) -> Array:
    """log(gamma) in float64: `[H]`, or `[H, K]` where every pair of key dimensions adds its own."""
    decay = np.array(config.decay)
    if not config.key_decay:
        return decay
    pairs = np.array(config.key_decay).reshape(-1, config.head_k_dim // 2)
    by_key: Array = decay[:, None] + np.repeat(pairs, 2, axis=1)  # [1 or H, K/2] -> [H, K]
    return by_key


def decay_sum_tables(config: RetNetConfig) -> dict[str, Array]:
    """sum_(i<=b) gamma^i, gamma^(b+1) and sum_(i<4096a) gamma^i, each `[4096, H]` float32."""
    steps = np.arange(POSITION_RADIX, dtype=np.float64)[:, None]
    tables = {
        "positions.decay_sum_low": _geometric_sum(config, steps + 1),
        "positions.decay_power_low": np.exp(np.array(config.decay) * (steps + 1)),
        "positions.decay_sum_high": _geometric_sum(config, steps * POSITION_RADIX),
    }
    return {name: table.astype(np.float32) for name, table in tables.items()}


def _geometric_sum(config: RetNetConfig, count: Array) -> Array:
    log_gamma = np.array(config.decay)
    safe = np.where(log_gamma == 0, -1.0, log_gamma)
    return np.where(log_gamma == 0, count, np.expm1(safe * count) / np.expm1(safe))
