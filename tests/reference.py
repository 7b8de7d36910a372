"""A whole RetNet in numpy float64, one token at a time: the recurrence of Eq. 6 with complex rotation, written apart
from the package so that the tests have something to judge it by. Head-norm epsilon and clamps follow the recurrence:
no clamp."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from retnet_tools.config import BlockNorm, RetNetConfig
from retnet_tools.weights import WeightSource

Floats = npt.NDArray[np.float64]

ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "leaky_relu": lambda x: np.where(x < 0, 0.01 * x, x),
    "elu": lambda x: np.where(x < 0, np.expm1(x), x),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


def reference_logits(config: RetNetConfig, source: WeightSource, input_ids: npt.NDArray[Any]) -> Floats:
    """Logits `[B, T, vocab]` of tokens `[B, T]`, from zero states and position 0; a stack maps embeddings
    `[B, T, D]` to hidden states."""
    weights = {name: source.read(name).astype(np.float64) for name in source.names()}
    return np.stack([_row(config, weights, row) for row in input_ids])


def _row(config: RetNetConfig, w: Mapping[str, Floats], tokens: npt.NDArray[Any]) -> Floats:
    shape = (config.num_heads, config.head_k_dim, config.head_v_dim)
    states = [np.zeros(shape) for _ in range(config.num_layers)]
    logits = []
    for position, token in enumerate(tokens):
        x = w["embedding.weight"][token] * config.embedding_scale if config.has_vocabulary else token.astype(float)
        if config.embedding_norm:
            x = _norm(config, w, "embedding_norm", x)
        for i in range(config.num_layers):
            x = _layer(config, w, i, x, states[i], position)
        if config.final_norm:
            x = _norm(config, w, "final_norm", x)
        if config.output_norm is not None:
            x = _norm(config, w, "output_norm", x, config.output_norm)
        if config.tie_word_embeddings:
            x = w["embedding.weight"] @ x
        elif config.has_vocabulary:
            x = _linear(w, "lm_head", x)
        logits.append(x)
    return np.stack(logits)


def _layer(c: RetNetConfig, w: Mapping[str, Floats], i: int, x: Floats, state: Floats, position: int) -> Floats:
    name = f"layers.{i}"
    if c.parallel_residual:
        one = _norm(c, w, f"{name}.retention_norm", x)
        two = one if c.shared_block_norm else _norm(c, w, f"{name}.ffn_norm", x)
        blocks = _retention(c, w, name, one, state, position), _feed_forward(c, w, f"{name}.ffn", two)
        return c.residual_alpha * x + sum(blocks)
    if c.norm_order == "pre":
        x = c.residual_alpha * x + _retention(c, w, name, _norm(c, w, f"{name}.retention_norm", x), state, position)
        return c.residual_alpha * x + _feed_forward(c, w, f"{name}.ffn", _norm(c, w, f"{name}.ffn_norm", x))
    if c.norm_order == "branch":
        x = c.residual_alpha * x + _norm(c, w, f"{name}.retention_norm", _retention(c, w, name, x, state, position))
        return c.residual_alpha * x + _norm(c, w, f"{name}.ffn_norm", _feed_forward(c, w, f"{name}.ffn", x))
    x = _norm(c, w, f"{name}.retention_norm", c.residual_alpha * x + _retention(c, w, name, x, state, position))
    return _norm(c, w, f"{name}.ffn_norm", c.residual_alpha * x + _feed_forward(c, w, f"{name}.ffn", x))


def _retention(c: RetNetConfig, w: Mapping[str, Floats], layer: str, x: Floats, state: Floats, position: int) -> Floats:
    name = f"{layer}.retention"
    turn = np.exp(1j * position * _of_heads(c, c.rotary_frequencies))
    q, k, v = (_linear(w, f"{name}.{p}_proj", x) for p in "qkv")
    if c.feature_map is not None:
        q, k = (ACTIVATIONS[c.feature_map](y) for y in (q, k))
    q, k, v = (y.reshape(-1, size) for y, size in ((q, c.head_k_dim), (k, c.head_k_dim), (v, c.head_v_dim)))
    k = np.repeat(k, c.num_kv_groups, axis=0)
    v = np.repeat(v, c.num_kv_groups, axis=0)
    q, k = _turned(q, turn), _turned(k, turn) * c.score_normalization.key_scale
    key_gamma = np.repeat(np.exp(_of_heads(c, c.key_decay or (0.0,) * (c.head_k_dim // 2))), 2, axis=1)
    heads = []
    for h in range(c.num_heads):
        gamma = math.exp(c.decay[h])
        state[h] = gamma * key_gamma[h, :, None] * state[h] + np.outer(k[h], v[h])
        o = q[h] @ state[h]
        if c.score_normalization.by_decay:
            o = o / math.sqrt(math.fsum(gamma**j for j in range(position + 1)))
        heads.append(_head_norm(c, w, f"{name}.head_norm", h, o))
    y = np.concatenate(heads)
    if c.gate is not None:
        y = ACTIVATIONS[c.gate](_linear(w, f"{name}.gate_proj", x)) * y
    return _linear(w, f"{name}.out_proj", y)


def _head_norm(c: RetNetConfig, w: Mapping[str, Floats], name: str, head: int, o: Floats) -> Floats:
    norm = c.head_norm
    if norm.kind == "layer":
        o = o - o.mean()
    if norm.kind != "none":
        o = o / math.sqrt((o**2).mean() + norm.eps)
    for part, apply in (("weight", np.multiply), ("bias", np.add)):
        if f"{name}.{part}" in w:
            values = w[f"{name}.{part}"]
            o = apply(o, values if norm.weight == "shared" else values.reshape(c.num_heads, -1)[head])
    return o


def _feed_forward(c: RetNetConfig, w: Mapping[str, Floats], name: str, x: Floats) -> Floats:
    act, up = ACTIVATIONS[c.feed_forward.activation], _linear(w, f"{name}.up_proj", x)
    y = act(_linear(w, f"{name}.gate_proj", x)) * up if c.feed_forward.kind == "glu" else act(up)
    if c.feed_forward.norm is not None:
        y = _norm(c, w, f"{name}.norm", y, c.feed_forward.norm)
    return _linear(w, f"{name}.down_proj", y)


def _norm(c: RetNetConfig, w: Mapping[str, Floats], name: str, x: Floats, kind: BlockNorm | None = None) -> Floats:
    kind = kind or c.block_norm
    if kind.kind == "layer":
        x = x - x.mean()
    y = x / math.sqrt((x**2).mean() + kind.eps) * w[f"{name}.weight"]
    return y + w[f"{name}.bias"] if kind.bias else y


def _linear(w: Mapping[str, Floats], name: str, x: Floats) -> Floats:
    y = w[f"{name}.weight"] @ x
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _of_heads(c: RetNetConfig, schedule: tuple[float, ...]) -> Floats:
    """`[H, K/2]` of what one head after another has, or all heads share."""
    numbers = np.array(schedule).reshape(-1, c.key_dim // c.num_heads // 2)
    return np.broadcast_to(numbers, (c.num_heads, numbers.shape[1]))


def _turned(x: Floats, turn: npt.NDArray[np.complex128]) -> Floats:
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack((z.real, z.imag), -1).reshape(x.shape)
