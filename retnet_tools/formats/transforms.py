"""How stored tensors become canonical ones, where names alone do not do it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retnet_tools.formats.spec import Transform
from retnet_tools.weights import Array


def halves_to_pairs(head_k_dim: int) -> Transform:
    """Rows of q or k where row i of a head is rotated with row i + K/2, put into adjacent pairs: `[H*K, D]`.

    q and k are permuted alike, so their products stay what they are.
    """

    def apply(parts: Sequence[Array]) -> Array:
        rows = parts[0]
        halves = rows.reshape(-1, 2, head_k_dim // 2, rows.shape[-1])  # [H*K, D] -> [H, 2, K/2, D]
        return halves.swapaxes(1, 2).reshape(rows.shape)

    def invert(rows: Array) -> Array:
        pairs = rows.reshape(-1, head_k_dim // 2, 2, rows.shape[-1])  # [H*K, D] -> [H, K/2, 2, D]
        return pairs.swapaxes(1, 2).reshape(rows.shape)

    return Transform(lambda shape: shape, apply, invert)


def joined_heads(num_heads: int) -> Transform:
    """One matrix `[D, K]` a head, used as x W, joined to `[H*K, D]`."""
    return Transform(
        lambda shape: (shape[1], shape[0] // num_heads), lambda parts: np.concatenate([part.T for part in parts])
    )


def row_range(start: int, size: int, total: int) -> Transform:
    """One of several matrices that are stored as one, below each other: `size` rows of `total`, from `start` on."""
    return Transform(lambda shape: (total, *shape[1:]), lambda parts: parts[0][start : start + size].copy())


def head_part(index: int, count: int, num_heads: int) -> Transform:
    """One of several matrices whose rows are stored head by head: N rows of the first, of the second, ..., for each
    head, `[H * count * N, ...]`."""

    def apply(parts: Sequence[Array]) -> Array:
        rows = parts[0]
        by_head = rows.reshape(num_heads, count, -1, *rows.shape[1:])  # [H*count*N, ...] -> [H, count, N, ...]
        return by_head[:, index].reshape(-1, *rows.shape[1:])

    return Transform(lambda shape: (count * shape[0], *shape[1:]), apply)


TRANSPOSED = Transform(lambda shape: shape[::-1], lambda parts: parts[0].T)
"""A matrix `[in, out]`, used as x W."""
