"""A Transformer decoder in numpy float64 with full causal attention and no cache, written apart from the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from retnet_tools.bench.transformer_graph import TransformerConfig
from retnet_tools.weights import WeightSource
from tests.reference import ACTIVATIONS

Floats = npt.NDArray[np.float64]

CONFIG = TransformerConfig(
    vocab_size=61,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    ffn_dim=72,
    activation="gelu",
    norm_eps=1e-6,
    tie_word_embeddings=False,
    max_positions=64,
)


def transformer_logits(config: TransformerConfig, source: WeightSource, input_ids: npt.NDArray[Any]) -> Floats:
    """Logits `[B, T, vocab]` of tokens `[B, T]`."""
    w = {name: source.read(name).astype(np.float64) for name in source.names()}
    return np.stack([_row(config, w, row) for row in input_ids])


def _row(c: TransformerConfig, w: Mapping[str, Floats], tokens: npt.NDArray[Any]) -> Floats:
    def norm(name: str, x: Floats) -> Floats:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * w[f"{name}.weight"]

    def linear(name: str, x: Floats) -> Floats:
        return x @ w[f"{name}.weight"].T

    x = w["embedding.weight"][tokens]
    for i in range(c.num_layers):
        layer = f"layers.{i}"
        x = x + linear(f"{layer}.attention.out_proj", _attention(c, linear, layer, norm(f"{layer}.attention_norm", x)))
        h = norm(f"{layer}.ffn_norm", x)
        gated = ACTIVATIONS[c.activation](linear(f"{layer}.ffn.gate_proj", h)) * linear(f"{layer}.ffn.up_proj", h)
        x = x + linear(f"{layer}.ffn.down_proj", gated)
    x = norm("final_norm", x)
    return x @ w["embedding.weight" if c.tie_word_embeddings else "lm_head.weight"].T


def _attention(c: TransformerConfig, linear: Callable[[str, Floats], Floats], layer: str, x: Floats) -> Floats:
    q, k, v = (linear(f"{layer}.attention.{part}_proj", x) for part in "qkv")
    size, heads = c.hidden_size // c.num_heads, []
    for head in range(c.num_heads):
        shared = head // (c.num_heads // c.num_kv_heads)
        qh = _turn(q[:, head * size : (head + 1) * size])
        kh = _turn(k[:, shared * size : (shared + 1) * size])
        scores = qh @ kh.T / math.sqrt(size)
        scores[np.triu_indices(len(x), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        heads.append(weights @ v[:, shared * size : (shared + 1) * size])
    return np.concatenate(heads, axis=1)


def _turn(x: Floats) -> Floats:
    """Rotate pairs (i, i + D/2) of position n by n 10000^(-2i/D)."""
    half = x.shape[1] // 2
    z = x[:, :half] + 1j * x[:, half:]
    z = z * np.exp(1j * np.outer(np.arange(len(x)), 10000.0 ** (-2 * np.arange(half) / x.shape[1])))
    return np.concatenate([z.real, z.imag], axis=1)
