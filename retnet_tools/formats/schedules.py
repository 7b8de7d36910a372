"""The published schedules as the implementations compute them: step by step in float32.

A model runs with the rounded numbers that its code makes, so those are the model; one rounding at the end would differ
in the last bit. Powers, exponentials and logarithms are rounded correctly here, which is what torch does but for about
one power in a hundred, all of them in heads of more than 64 key dimensions.
"""

from __future__ import annotations

import math

import numpy as np

from retnet_tools.weights import Array

ONE = np.float32(1)
SHORTEST, LONGEST = math.log(1 / 32), math.log(1 / 512)


def linspace_frequencies(head_k_dim: int) -> Array:
    """1 / 10000^linspace(0, 1, K/2), float32 `[K/2]`."""
    return _inverse_powers(_linspace(0.0, 1.0, head_k_dim // 2))


def rope_frequencies(head_k_dim: int) -> Array:
    """1 / 10000^(2i/K), float32 `[K/2]`."""
    return _inverse_powers(np.arange(0, head_k_dim, 2, dtype=np.float32) / np.float32(head_k_dim))


def paper_log_decay(num_heads: int) -> Array:
    """log(1 - 2^(-5-h)), float32 `[H]`; 0 from h = 20 on, where gamma rounds to 1."""
    gammas = (1 - 2.0 ** (-5.0 - np.arange(num_heads))).astype(np.float32)
    return np.log(gammas.astype(np.float64)).astype(np.float32)


def language_model_gammas(num_heads: int) -> Array:
    """1 - exp(linspace(log 1/32, log 1/512, H)), float32 `[H]`: the paper's other schedule."""
    steps = _linspace(SHORTEST, LONGEST, num_heads)
    return ONE - np.exp(steps.astype(np.float64)).astype(np.float32)


def language_model_log_decay(num_heads: int) -> Array:
    """log of `language_model_gammas`, float32 `[H]`."""
    return np.log(language_model_gammas(num_heads).astype(np.float64)).astype(np.float32)


def xatl_log2_decay(num_heads: int) -> Array:
    """log2(1 - 2^(-5-h)), float32 `[H]`, as RetNet-XATL keeps it."""
    gammas = (1 - 2.0 ** (-5.0 - np.arange(num_heads))).astype(np.float32)
    return np.log2(gammas.astype(np.float64)).astype(np.float32)


def xatl_language_model_log2_decay(num_heads: int) -> Array:
    """log2(1 - exp(linspace(-5, -9, H))), float32 `[H]`: the other schedule of RetNet-XATL, which takes the exponential
    of logarithms to base 2."""
    gammas = ONE - np.exp(_linspace(-5.0, -9.0, num_heads).astype(np.float64)).astype(np.float32)
    return np.log2(gammas.astype(np.float64)).astype(np.float32)


def floats(values: Array) -> tuple[float, ...]:
    """The numbers as float64, for a configuration."""
    return tuple(float(value) for value in values)


def _inverse_powers(exponents: Array) -> Array:
    powers = (10000.0 ** exponents.astype(np.float64)).astype(np.float32)
    return ONE / powers


def _linspace(start: float, end: float, count: int) -> Array:
    """torch's: from the start in the first half, from the end in the second."""
    first, last = np.float32(start), np.float32(end)
    if count == 1:
        return np.array([first])
    step = (last - first) / np.float32(count - 1)
    i = np.arange(count, dtype=np.float32)
    # Each product and sum is fused in torch: rounded once.
    up, down = (np.float64(step) * x for x in (i, np.float32(count - 1) - i))
    return np.where(i < count // 2, first + up, last - down).astype(np.float32)
