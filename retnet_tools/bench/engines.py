"""The implementations in ONNX Runtime that are measured, behind one interface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from retnet_tools.bench.specs import RetNetSpec, TransformerSpec
from retnet_tools.bench.transformer_session import KeyValues, TransformerSession
from retnet_tools.config import RetNetConfig
from retnet_tools.graph.contract import state_shape
from retnet_tools.random_weights import noise
from retnet_tools.runtime.providers import Device
from retnet_tools.runtime.recurrent_state import RecurrentState
from retnet_tools.runtime.session import DecoderSession
from retnet_tools.weights import Array


class Engine(Protocol):
    """A model that reads tokens after a context that was placed, not computed.

    Attributes:
        device: where it really runs.
        prompt_at_once: tokens of a prompt that it reads at once; None reads it whole.
    """

    vocab_size: int
    device: Device
    prompt_at_once: int | None

    @property
    def captured(self) -> bool | None:
        """Whether steps were replayed as CUDA graphs so far; None on the CPU, and in torch."""
        ...

    def place(self, batch: int, depth: int | Array, room: int) -> None:
        """Let `batch` sequences hold `depth` random tokens each, with room for `room` in all."""
        ...

    def feed(self, input_ids: Array) -> Array:
        """Feed tokens `[B, T]`; logits `[B, vocab]` after the last of them."""
        ...

    def release(self) -> None:
        """Forget the sequences and give their memory back."""
        ...


class RetNetEngine:
    """An exported RetNet: steps, and prompts by chunks."""

    def __init__(self, spec: RetNetSpec) -> None:
        self._session = DecoderSession(
            spec.folder,
            spec.device,
            spec.threads,
            cuda_graph=None if spec.cuda_graph else False,
            prompts=spec.prompts,
            profile=spec.profile,
        )
        if spec.prompts:
            self._session.open_prefill()
        self._state: RecurrentState | None = None
        self.vocab_size = self._session.manifest.config.vocab_size
        self.device = self._session.device
        self.prompt_at_once: int | None = spec.chunk_size

    @property
    def captured(self) -> bool | None:
        """As far as steps have run: a capture can fail when it begins."""
        return None if self.device.kind == "cpu" else self._session.eager_reason is None

    def place(self, batch: int, depth: int | Array, room: int) -> None:
        """Random states at a position, or zero states at position 0."""
        position = np.broadcast_to(np.asarray(depth, dtype=np.int64), (batch,))
        manifest = self._session.manifest
        self.release()
        # The session gives back what it kept of other batch sizes.
        self._state = self._session.new_state(batch)
        if position.any():
            states = placed_states(manifest.config, batch, manifest.state_dtype)
            for value, state in zip(self._state.current, states, strict=True):
                value.write(state)
            self._state.position = np.array(position)

    def feed(self, input_ids: Array) -> Array:
        """A step for one token, chunks for more."""
        assert self._state is not None
        if input_ids.shape[1] == 1:
            return np.asarray(self._session.step(input_ids[:, 0], self._state))
        assert self.prompt_at_once is not None
        return self._session.prefill(input_ids, self._state, chunk_size=self.prompt_at_once)

    def release(self) -> None:
        """Drop the states."""
        self._state = None

    def end_profile(self) -> Path:
        """Write the profile that was asked for, of steps."""
        return self._session.end_profile()


class TransformerEngine:
    """A Transformer with a KV cache, which is written in place; a prompt is read at once."""

    def __init__(self, spec: TransformerSpec) -> None:
        self._session = TransformerSession(
            spec.folder,
            spec.config,
            spec.dtype,
            spec.device,
            spec.threads,
            cuda_graph=None if spec.cuda_graph else False,
        )
        self._cache: KeyValues | None = None
        self.vocab_size = spec.config.vocab_size
        self.device = spec.device
        self.prompt_at_once: int | None = None

    @property
    def captured(self) -> bool | None:
        """As far as steps have run: a capture can fail when it begins."""
        return None if self.device.kind == "cpu" else self._session.eager_reason is None

    def place(self, batch: int, depth: int | Array, room: int) -> None:
        """A cache of random keys and values; all rows hold equally many tokens."""
        self.release()
        self._cache = self._session.new_cache(batch, room, int(depth), noise if depth else np.zeros)

    def feed(self, input_ids: Array) -> Array:
        """One run of the graph."""
        assert self._cache is not None
        return self._session.run(input_ids, self._cache)

    def release(self) -> None:
        """Drop the cache."""
        self._cache = None


def placed_states(config: RetNetConfig, batch: int, dtype: Any) -> Iterator[Array]:
    """States `[B, H, K, V]`, N(0, 1), layer by layer; they differ from layer to layer."""
    shape = (batch, *state_shape(config))
    for i in range(config.num_layers):
        yield noise(shape, start=7919 * i).astype(dtype, copy=False)


def empty_states(config: RetNetConfig, batch: int, dtype: Any) -> Iterator[Array]:
    """Zeros in the same shapes."""
    for _ in range(config.num_layers):
        yield np.zeros((batch, *state_shape(config)), dtype=dtype)
