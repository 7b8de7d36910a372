"""What an export is run on to hold it to its checkpoint.

start   one row from position 0: step by step, in one piece, in chunks, and handed over from one graph to the other
        after 1 token, around the edges of chunks, and before the last
far     rows with full states just before the positions 10^3, 4096, 10^6 and the last: step by step, in one piece,
        and as a ragged batch, whose rows then step from places of their own
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.graph.contract import MAX_POSITION
from retnet_tools.tokenizing.token_ids import random_tokens
from retnet_tools.weights import Array

LEAST_TOKENS = 8
CHUNK = 64
FAR_TOKENS = 24
FAR_POSITIONS = (1_000, 4_096, 1_000_000, MAX_POSITION)
"""Rows cross all but the last, at which theirs ends."""
FAR_LENGTHS = (FAR_TOKENS // 2, 1, FAR_TOKENS - 2, FAR_TOKENS - 1)
"""Tokens of each row in the ragged batch."""
MOST_SEEN = 4096
"""Tokens whose sum the state of a far row is as large as, at most."""


def chunk_edges(tokens: int) -> list[int]:
    """Where a prompt is cut into chunks: after 1 and 3 tokens, then every 64, or sooner in a short one; and its end."""
    size = max(4, min(CHUNK, tokens // 3))
    return [*(edge for edge in (1, 3, *range(size, tokens, size)) if edge < tokens), tokens]


def handoff_cuts(tokens: int) -> list[int]:
    """Where one graph takes over from the other: after 1 token, around the edges of chunks, before the last."""
    around = {edge + by for edge in chunk_edges(tokens)[2:] for by in (-1, 0, 1)}
    return sorted(cut for cut in {1, tokens - 1, *around} if 0 < cut < tokens)


def start_cuts(tokens: int) -> tuple[int, ...]:
    """After how many tokens of the first walk states are looked at."""
    return tuple(sorted({*chunk_edges(tokens), *handoff_cuts(tokens)}))


def far_tokens(config: RetNetConfig, seed: int) -> Array:
    """Random ids `[4, T]`, or embeddings `[4, T, D]`."""
    rows = len(FAR_POSITIONS)
    if config.has_vocabulary:
        return random_tokens(config.vocab_size, rows, FAR_TOKENS, seed)
    return np.random.default_rng(seed).standard_normal((rows, FAR_TOKENS, config.hidden_size), dtype=np.float32)


def far_positions() -> Array:
    """Of the first token of each row."""
    return np.array([*(p - FAR_TOKENS // 3 for p in FAR_POSITIONS[:-1]), MAX_POSITION - FAR_TOKENS + 1])


def far_states(config: RetNetConfig, seen: Sequence[Array], tokens: int, seed: int) -> list[Array]:
    """Random states `[4, H, K, V]` of the rows, one a layer, of the size that theirs would have.

    Args:
        seen: the states of a row after `tokens` tokens, `[1, H, K, V]` each.
    """
    rng, positions = np.random.default_rng(seed), far_positions()
    sizes = np.sqrt([_energy(config, int(n)) / _energy(config, tokens) for n in np.minimum(positions, MOST_SEEN)])
    states = []
    for state in seen:
        rms = np.sqrt(np.square(state.astype(np.float64)).mean((2, 3), keepdims=True))  # [1, H, 1, 1]
        states.append(rms * sizes[:, :, None, None] * rng.standard_normal((len(positions), *state.shape[1:])))
    return states


def _energy(config: RetNetConfig, tokens: int) -> Array:
    """sum of gamma^(2i) over i < tokens for each head, `[H]`: what the square of a state grows with."""
    slowest = [d + max(config.of_head(config.key_decay, h), default=0.0) for h, d in enumerate(config.decay)]
    powers = np.exp(2 * np.array(slowest)[:, None] * np.arange(tokens))
    return np.asarray(powers.sum(1))
