"""What positions contribute to a graph, the same for all layers: phases, and the normalisation by decay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from retnet_tools.config import RetNetConfig
from retnet_tools.graph.contract import POSITION_RADIX
from retnet_tools.graph.nodes import GraphBuilder
from retnet_tools.graph.tables import decay_sum_tables, phase_tables
from retnet_tools.weights import Array


@dataclass(frozen=True)
class PositionTerms:
    """Phases of q, phases of k times its scale, and 1/sqrt(sum gamma^i) `[B, T, H, 1]`, float32.

    Phases are `[B, T, K/2]`; `[B, T*H, K/2]`, a head one more token, where each head has frequencies of its own.
    """

    cos: ir.Value
    sin: ir.Value
    key_cos: ir.Value
    key_sin: ir.Value
    score_scale: ir.Value | None


def position_terms(
    g: GraphBuilder,
    config: RetNetConfig,
    position_ids: ir.Value,
    table: Callable[[str, Array], ir.Value],
    key_mask: ir.Value | None,
) -> PositionTerms:
    """Look up and combine the tables of `retnet_tools.graph.tables`.

    Args:
        position_ids: `[B, T]`.
        table: declares a stored table.
        key_mask: `[B, T, 1]` float32, 1 at real tokens and 0 at padding; None where every token is real.
    """
    radix = g.constant("position_radix", np.array(POSITION_RADIX, dtype=np.int64))
    high = g.op("Div", position_ids, radix)
    low = g.op("Sub", position_ids, g.op("Mul", high, radix))

    def lookup(tables: dict[str, Array], name: str) -> ir.Value:
        return g.op("Gather", table(name, tables[name]), high if name.endswith("high") else low, axis=0)

    phases = phase_tables(config)
    cos_l, sin_l, cos_h, sin_h = (lookup(phases, f"positions.{f}_{p}") for p in ("low", "high") for f in ("cos", "sin"))
    cos = g.op("Sub", g.op("Mul", cos_h, cos_l), g.op("Mul", sin_h, sin_l))
    sin = g.op("Add", g.op("Mul", sin_h, cos_l), g.op("Mul", cos_h, sin_l))
    # The scale of k and the mask ride on its rotation: one product for the whole graph, exact in every weight type.
    key_cos, key_sin = (g.scale(x, config.score_normalization.key_scale, "float32") for x in (cos, sin))
    if key_mask is not None:
        key_cos, key_sin = (g.op("Mul", x, key_mask) for x in (key_cos, key_sin))
    if config.has_head_rotation:
        pairs = config.head_k_dim // 2
        # [B, T, H*K/2] -> [B, T*H, K/2]
        cos, sin, key_cos, key_sin = (g.reshape(x, 0, -1, pairs) for x in (cos, sin, key_cos, key_sin))
    if not config.score_normalization.by_decay:
        return PositionTerms(cos, sin, key_cos, key_sin, None)
    sums = decay_sum_tables(config)
    carried = g.op("Mul", lookup(sums, "positions.decay_power_low"), lookup(sums, "positions.decay_sum_high"))
    root = g.op("Sqrt", g.op("Add", lookup(sums, "positions.decay_sum_low"), carried))
    scale = g.op("Unsqueeze", g.op("Reciprocal", root), g.integers(-1))  # [B, T, H] -> [B, T, H, 1]
    return PositionTerms(cos, sin, key_cos, key_sin, scale)
