"""The norms of the network in torch: around blocks, and of each head's output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retnet_tools.config import BlockNorm, HeadNorm, RetNetConfig


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, accumulated in float32 (float64 for float64 input)."""

    def __init__(self, size: int, norm: BlockNorm) -> None:
        super().__init__()
        self.kind, self.eps = norm.kind, norm.eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if norm.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., size]`; the result has the dtype of x."""
        y = normalize(wide(x), self.kind, self.eps).to(x.dtype) * self.weight
        return y if self.bias is None else y + self.bias


class HeadNormalization(nn.Module):
    """GroupNorm_h of Eq. 8: each head's V values normalised on their own."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        self.norm: HeadNorm = config.head_norm
        self.head_shape = (config.num_heads, config.head_v_dim)
        size = {"none": 0, "shared": config.head_v_dim, "channel": config.value_dim}[self.norm.weight]
        self.weight = nn.Parameter(torch.ones(size)) if size else None
        self.bias = nn.Parameter(torch.zeros(size)) if self.norm.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each head of `[B, T, H, V]`."""
        y = normalize(x, self.norm.kind, self.norm.eps)  # x: [B, T, H, V]
        if self.weight is not None:
            y = y * self._per_head(self.weight)
        return y if self.bias is None else y + self._per_head(self.bias)

    def _per_head(self, parameter: Tensor) -> Tensor:
        return parameter.view(self.head_shape) if self.norm.weight == "channel" else parameter


def normalize(x: Tensor, kind: str, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) (`rms`), the same of x - mean(x) (`layer`), or x (`none`), over the last dimension.

    A zero vector stays zero when eps is 0.
    """
    if kind == "none":
        return x
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + max(eps, torch.finfo(x.dtype).tiny))


def wide(x: Tensor) -> Tensor:
    """The tensor in float32 where it is of a half type."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
