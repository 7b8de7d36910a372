"""Rotation of q and k by position: the e^(i n theta) of Eq. 3, on interleaved pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotary_phases(
    positions: Tensor, frequencies: Sequence[float], dtype: torch.dtype, heads: int = 1
) -> tuple[Tensor, Tensor]:
    """cos(n theta_i) and sin(n theta_i), computed in float64.

    Args:
        positions: `[B, T]` int64.
        frequencies: theta, K/2 radians per position, of one head after another.
        dtype: of the result; float32 or float64, never a half type.
        heads: that have frequencies of their own; 1 where all share them.

    Returns:
        cos and sin, each `[B, heads, T, K/2]`.

    Source: Eq. 3 of arXiv 2307.08621.
    """
    theta = torch.tensor(frequencies, dtype=torch.float64, device=positions.device).view(heads, 1, -1)
    phase = positions.to(torch.float64)[:, None, :, None] * theta
    return torch.cos(phase).to(dtype), torch.sin(phase).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x_2i + i x_2i+1) e^(i n theta_i): rotate adjacent pairs of the last dimension.

    Args:
        x: `[B, H, T, K]`.
        cos, sin: `[B, 1 or H, T, K/2]`.

    Returns:
        `[B, H, T, K]`.
    """
    real, imaginary = x[..., 0::2], x[..., 1::2]
    pairs = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    return pairs.flatten(-2)  # [B, H, T, K/2, 2] -> [B, H, T, K]
