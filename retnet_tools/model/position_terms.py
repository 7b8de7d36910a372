"""What a position contributes to q, k and the state: powers of gamma, phases, score normalisation.

All are computed in float64 and cast to float32 or float64 last: gamma = 1 - 2^(-5-h) rounds to exactly 1 in half types.

Source: Sun et al. 2023, arXiv 2307.08621.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retnet_tools.config import RetNetConfig


@dataclass(frozen=True)
class PositionTerms:
    """What a position contributes, the same for all layers: phases `[B, 1 or H, T, K/2]`, and 1/sqrt(sum gamma^i)."""

    cos: Tensor
    sin: Tensor
    score_scale: Tensor | None


def terms_at(config: RetNetConfig, positions: Tensor, dtype: torch.dtype) -> PositionTerms:
    """What positions `[B or 1, T]` contribute to activations of a dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    heads = config.num_heads if config.has_head_rotation else 1
    cos, sin = rotary_phases(positions, config.rotary_frequencies, wide, heads)
    if not config.score_normalization.by_decay:
        return PositionTerms(cos, sin, None)
    decay = torch.tensor(config.decay, dtype=torch.float64, device=positions.device)
    return PositionTerms(cos, sin, decay_sums(decay, positions, torch.float64).rsqrt().to(wide))


def rotary_phases(
    positions: Tensor, frequencies: Sequence[float], dtype: torch.dtype, heads: int = 1
) -> tuple[Tensor, Tensor]:
    """cos(n theta_i) and sin(n theta_i), each `[B, heads, T, K/2]` (Eq. 3).

    Args:
        positions: `[B, T]` int64.
        frequencies: theta, K/2 radians per position, of one head after another.
        heads: that have frequencies of their own; 1 where all share them.
    """
    theta = torch.tensor(frequencies, dtype=torch.float64, device=positions.device).view(heads, 1, -1)
    phase = positions.to(torch.float64)[:, None, :, None] * theta
    return torch.cos(phase).to(dtype), torch.sin(phase).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x_2i + i x_2i+1) e^(i n theta_i) (Eq. 3): rotate adjacent pairs of the last dimension of `[B, H, T, K]`.

    `cos` and `sin` are `[B, 1 or H, T, K/2]`.
    """
    real, imaginary = x[..., 0::2], x[..., 1::2]
    pairs = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    return pairs.flatten(-2)  # [B, H, T, K/2, 2] -> [B, H, T, K]


def log_decay(config: RetNetConfig, device: torch.device) -> Tensor:
    """log(gamma) in float64: `[H]`, or `[H, K]` where every pair of key dimensions adds its own."""
    decay = torch.tensor(config.decay, dtype=torch.float64, device=device)
    if not config.key_decay:
        return decay
    pairs = torch.tensor(config.key_decay, dtype=torch.float64, device=device).view(-1, config.head_k_dim // 2)
    return decay[:, None] + pairs.repeat_interleave(2, dim=1)  # [1 or H, K/2] -> [H, K]


def gamma_powers(decay: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """gamma^n for log(gamma) `[H]` or `[H, K]` and integers n `[...]`: `[H, ...]` or `[H, K, ...]`."""
    shape = tuple(decay.shape) + (1,) * exponents.dim()
    return torch.exp(decay.to(torch.float64).view(shape) * exponents.to(torch.float64)).to(dtype)


def decay_matrix(decay: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """D_nm = gamma^(n-m) for n >= m, else 0 (Eq. 5): `[H, T, T]` for log(gamma) `[H]`."""
    steps = torch.arange(length, device=decay.device)
    powers = gamma_powers(decay, steps, dtype)  # [H, T]
    distance = steps[:, None] - steps[None, :]
    return torch.where(distance >= 0, powers[:, distance.clamp(min=0)], powers.new_zeros(()))


def decay_sums(decay: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_(i=0)^n gamma^i = (1 - gamma^(n+1)) / (1 - gamma), the row sums of D, or n + 1 for gamma = 1.

    For log(gamma) `[H]` at absolute positions n `[B, T]`: `[B, H, T, 1]` (section "Retention Score Normalization").
    """
    log_gamma = decay.to(torch.float64).view(-1, 1)
    count = (positions.to(torch.float64) + 1)[:, None, :]  # [B, 1, T]
    geometric = torch.expm1(log_gamma * count) / torch.expm1(log_gamma)
    return torch.where(log_gamma == 0, count, geometric)[..., None].to(dtype)
