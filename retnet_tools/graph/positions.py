"""What positions contribute to a graph, the same for all layers: phases, and the normalisation by decay.

Small float32 tables hold them exactly for 16.7 million positions. A position is n = 4096 a + b; in float64, rounded
once:

    e^(i n theta) = e^(i 4096 a theta) e^(i b theta)                                          (angle addition)
    sum_(i=0)^n gamma^i = sum_(i=0)^b gamma^i + gamma^(b+1) sum_(i=0)^(4096 a - 1) gamma^i    (positive terms only)

float32 `angle * position` is off by 0.02 rad at a million tokens; these are off by about 1e-7 at any position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx_ir import Value

from retnet_tools.config import RetNetConfig
from retnet_tools.graph.contract import POSITION_RADIX
from retnet_tools.graph.nodes import GraphBuilder
from retnet_tools.weights import Array


@dataclass(frozen=True)
class PositionValues:
    """Phases of q, phases of k times its scale, and 1/sqrt(sum gamma^i) `[B, T, H, 1]`, float32.

    Phases are `[B, T, K/2]`; `[B, T*H, K/2]`, a head one more token, where each head has frequencies of its own.
    """

    cos: Value
    sin: Value
    key_cos: Value
    key_sin: Value
    score_scale: Value | None


def position_values(
    g: GraphBuilder,
    config: RetNetConfig,
    position_ids: Value,
    table: Callable[[str, Array], Value],
    key_mask: Value,
) -> PositionValues:
    """Look up and combine the tables.

    Args:
        position_ids: `[B, T]`.
        table: declares a stored table.
        key_mask: `[B, T, 1]` float32: 1 at real tokens, 0 at padding, NaN where nothing right can come out.
    """
    radix = g.int64("position_radix", POSITION_RADIX)
    high = g.op("Div", position_ids, radix)
    low = g.op("Sub", position_ids, g.op("Mul", high, radix))

    def lookup(tables: dict[str, Array], name: str) -> Value:
        return g.op("Gather", table(name, tables[name]), high if name.endswith("high") else low, axis=0)

    phases = phase_tables(config)
    cos_l, sin_l, cos_h, sin_h = (lookup(phases, f"positions.{f}_{p}") for p in ("low", "high") for f in ("cos", "sin"))
    cos = g.op("Sub", g.op("Mul", cos_h, cos_l), g.op("Mul", sin_h, sin_l))
    sin = g.op("Add", g.op("Mul", sin_h, cos_l), g.op("Mul", cos_h, sin_l))
    # The scale of k and the mask ride on its rotation: one product for the whole graph, exact in every weight type.
    key_scale = g.scale(key_mask, config.score_normalization.key_scale, "float32")
    key_cos, key_sin = (g.op("Mul", x, key_scale) for x in (cos, sin))
    if config.has_head_rotation:
        pairs = config.head_k_dim // 2
        # [B, T, H*K/2] -> [B, T*H, K/2]
        cos, sin, key_cos, key_sin = (g.reshape(x, 0, -1, pairs) for x in (cos, sin, key_cos, key_sin))
    if not config.score_normalization.by_decay:
        return PositionValues(cos, sin, key_cos, key_sin, None)
    sums = decay_sum_tables(config)
    carried = g.op("Mul", lookup(sums, "positions.decay_power_low"), lookup(sums, "positions.decay_sum_high"))
    root = g.op("Sqrt", g.op("Add", lookup(sums, "positions.decay_sum_low"), carried))
    scale = g.op("Unsqueeze", g.op("Reciprocal", root), g.integers(-1))  # [B, T, H] -> [B, T, H, 1]
    return PositionValues(cos, sin, key_cos, key_sin, scale)


def phase_tables(config: RetNetConfig, dtype: str = "float32") -> dict[str, Array]:
    """cos and sin of b theta (`low`) and 4096 a theta (`high`), each `[4096, K/2]`, computed in float64.

    `[4096, H*K/2]` where each head has frequencies of its own.
    """
    theta = np.array(config.rotary_frequencies)
    steps = np.arange(POSITION_RADIX, dtype=np.float64)[:, None]
    tables = {}
    for part, positions in (("low", steps), ("high", steps * POSITION_RADIX)):
        tables[f"positions.cos_{part}"] = np.cos(positions * theta).astype(dtype)
        tables[f"positions.sin_{part}"] = np.sin(positions * theta).astype(dtype)
    return tables


def decay_sum_tables(config: RetNetConfig, dtype: str = "float32") -> dict[str, Array]:
    """sum_(i<=b) gamma^i, gamma^(b+1) and sum_(i<4096a) gamma^i, each `[4096, H]`, computed in float64."""
    steps = np.arange(POSITION_RADIX, dtype=np.float64)[:, None]
    log_gamma = np.array(config.decay)
    safe = np.where(log_gamma == 0, -1.0, log_gamma)

    def sums(count: Array) -> Array:
        return np.where(log_gamma == 0, count, np.expm1(safe * count) / np.expm1(safe))

    tables = {
        "positions.decay_sum_low": sums(steps + 1),
        "positions.decay_power_low": np.exp(log_gamma * (steps + 1)),
        "positions.decay_sum_high": sums(steps * POSITION_RADIX),
    }
    return {name: table.astype(dtype) for name, table in tables.items()}
