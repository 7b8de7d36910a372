"""The implementations in ONNX Runtime that are measured, behind one interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.graph.contract import state_shape
from retnet_tools.random_weights import noise
from retnet_tools.reports.benchmark.specs import RetNetSpec, TransformerSpec
from retnet_tools.runtime.session import DecoderSession
from retnet_tools.runtime.state import RecurrentState
from retnet_tools.runtime.transformer import KeyValues, TransformerSession
from retnet_tools.weights import Array


class Engine(Protocol):
    """A model that reads tokens after a context that was placed, not computed."""

    vocab_size: int

    def place(self, batch: int, depth: int | Array, room: int) -> None:
        """Let `batch` sequences hold `depth` random tokens each, with room for `room` in all."""
        ...

    def feed(self, input_ids: Array) -> Array:
        """Feed tokens `[B, T]`; logits `[B, vocab]` after the last of them."""
        ...

    def release(self) -> None:
        """Forget the sequences and give their memory back."""
        ...

    def end_profile(self) -> Path:
        """Write the profile that was asked for."""
        ...


class RetNetEngine:
    """An exported RetNet: steps, and prompts by chunks."""

    def __init__(self, spec: RetNetSpec) -> None:
        self._session = DecoderSession(spec.folder, spec.device, spec.threads, profile=spec.profile)
        self._chunk_size = spec.chunk_size
        self._state: RecurrentState | None = None
        self.vocab_size = self._session.manifest.config.vocab_size

    def place(self, batch: int, depth: int | Array, room: int) -> None:
        """Random states at a position, or zero states at position 0."""
        position = np.broadcast_to(np.asarray(depth, dtype=np.int64), (batch,))
        manifest = self._session.manifest
        states = placed_states(manifest.config, batch, manifest.state_dtype, empty=not position.any())
        self._state = RecurrentState(states, position, self._session.device)

    def feed(self, input_ids: Array) -> Array:
        """A step for one token, chunks for more."""
        assert self._state is not None
        if input_ids.shape[1] == 1:
            return np.asarray(self._session.step(input_ids[:, 0], self._state))
        return self._session.prefill(input_ids, self._state, chunk_size=self._chunk_size)

    def release(self) -> None:
        """Drop the states."""
        self._state = None

    def end_profile(self) -> Path:
        """Of the step graph."""
        return self._session.end_profile()


class TransformerEngine:
    """A Transformer with a KV cache, which is written in place; a prompt is read at once."""

    def __init__(self, spec: TransformerSpec) -> None:
        self._session = TransformerSession(
            spec.folder, spec.config, spec.dtype, spec.device, spec.threads, profile=spec.profile
        )
        self._cache: KeyValues | None = None
        self.vocab_size = spec.config.vocab_size

    def place(self, batch: int, depth: int | Array, room: int) -> None:
        """A cache of random keys and values; all rows hold equally many tokens."""
        self._cache = self._session.new_cache(batch, room, int(depth), noise if depth else np.zeros)

    def feed(self, input_ids: Array) -> Array:
        """One run of the graph."""
        assert self._cache is not None
        return self._session.run(input_ids, self._cache)

    def release(self) -> None:
        """Drop the cache."""
        self._cache = None

    def end_profile(self) -> Path:
        """Of the graph."""
        return self._session.end_profile()


def placed_states(config: RetNetConfig, batch: int, dtype: Any, *, empty: bool) -> list[Array]:
    """One state `[B, H, K, V]` a layer: zero, or N(0, 1), which differs from layer to layer."""
    shape = (batch, *state_shape(config))
    if empty:
        return [np.zeros(shape, dtype=dtype) for _ in range(config.num_layers)]
    return [noise(shape, start=7919 * i).astype(dtype, copy=False) for i in range(config.num_layers)]
