"""Powers of gamma and what follows from them: D, zeta, xi and the sums that normalise the scores.

All are computed in float64 from log(gamma), then cast to float32 or float64: gamma = 1 - 2^(-5-h) rounds to exactly 1
in half types.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retnet_tools.config import RetNetConfig


def log_decay(config: RetNetConfig, device: torch.device) -> Tensor:
    """log(gamma) in float64: `[H]`, or `[H, K]` where every pair of key dimensions adds its own."""
    decay = torch.tensor(config.decay, dtype=torch.float64, device=device)
    if not config.key_decay:
        return decay
    pairs = torch.tensor(config.key_decay, dtype=torch.float64, device=device).view(-1, config.head_k_dim // 2)
    return decay[:, None] + pairs.repeat_interleave(2, dim=1)  # [1 or H, K/2] -> [H, K]


def gamma_powers(decay: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """gamma^n.

    Args:
        decay: `[H]` or `[H, K]`, log(gamma).
        exponents: `[...]` integers.
        dtype: of the result.

    Returns:
        `[H, ...]` or `[H, K, ...]`.
    """
    shape = tuple(decay.shape) + (1,) * exponents.dim()
    return torch.exp(decay.to(torch.float64).view(shape) * exponents.to(torch.float64)).to(dtype)


def decay_matrix(decay: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """D_nm = gamma^(n-m) for n >= m, else 0 (Eq. 5).

    Args:
        decay: `[H]` log(gamma).
        length: T.

    Returns:
        `[H, T, T]`.
    """
    steps = torch.arange(length, device=decay.device)
    powers = gamma_powers(decay, steps, dtype)  # [H, T]
    distance = steps[:, None] - steps[None, :]
    return torch.where(distance >= 0, powers[:, distance.clamp(min=0)], powers.new_zeros(()))


def decay_sums(decay: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_(i=0)^n gamma_h^i = (1 - gamma^(n+1)) / (1 - gamma), the row sums of D at absolute positions.

    Args:
        decay: `[H]` log(gamma); log(gamma) = 0 gives n + 1.
        positions: `[B, T]` int64.

    Returns:
        `[B, H, T, 1]`.

    Source: section "Retention Score Normalization" of arXiv 2307.08621.
    """
    log_gamma = decay.to(torch.float64).view(-1, 1)
    count = (positions.to(torch.float64) + 1)[:, None, :]  # [B, 1, T]
    geometric = torch.expm1(log_gamma * count) / torch.expm1(log_gamma)
    return torch.where(log_gamma == 0, count, geometric)[..., None].to(dtype)
