"""The recurrent state of a batch of sequences, held where the session runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from retnet_tools.errors import UsageError
from retnet_tools.graph.contract import state_shape
from retnet_tools.graph.manifest import Manifest
from retnet_tools.runtime.buffers import Buffer, DeviceBuffer, buffer_of, spare_buffer, zero_buffer
from retnet_tools.weights import Array

if TYPE_CHECKING:
    from retnet_tools.runtime.providers import Device


class RecurrentState:
    """States and the position they stand at: neither is valid without the other.

    A graph reads `current`. One that may write where it reads does so; another writes `spare`, and the two change
    places after it. Spare buffers are made when a graph first needs them.

    Args:
        states: one `[B, H, K, V]` a layer, which become the state where they are buffers, or arrays on the CPU.
        position: `[B]`.
        device: where to keep them.

    Attributes:
        current: one `[B, H, K, V]` a layer, S of Eq. 6.
        position: `[B]` int64, the position of the next token of each row.
        bindings: what graphs have bound to these buffers, kept here so that it goes when they go.
    """

    def __init__(self, states: Sequence[Array | Buffer], position: Array, device: Device) -> None:
        self.device = device
        self.current = [state if isinstance(state, Buffer) else buffer_of(state, device) for state in states]
        self.position = np.array(position, dtype=np.int64)
        self.bindings: dict[Any, Any] = {}
        self._spare: list[Buffer] | None = None

    @classmethod
    def zeros(cls, manifest: Manifest, batch: int, device: Device) -> RecurrentState:
        """The state before the first token of at least one sequence: S_0 = 0 at position 0."""
        if batch < 1:
            raise UsageError(f"a batch of {batch}", "at least one sequence")
        shape, layers = (batch, *state_shape(manifest.config)), range(manifest.config.num_layers)
        buffers = [zero_buffer(shape, manifest.state_dtype, device) for _ in layers]
        return cls(buffers, np.zeros(batch, dtype=np.int64), device)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.position)

    @property
    def spare(self) -> list[Buffer]:
        """Buffers of the same shapes for a graph that may not write where it reads."""
        if self._spare is None:
            self._spare = [spare_buffer(buffer.shape, buffer.dtype, self.device) for buffer in self.current]
        return self._spare

    def release_spare(self) -> None:
        """Give the spare buffers back, with whatever is bound to them."""
        self._spare = None
        self.bindings.clear()

    def numpy(self) -> list[Array]:
        """A copy of the states, one `[B, H, K, V]` a layer."""
        return [buffer.read() for buffer in self.current]

    def select(self, rows: Sequence[int]) -> RecurrentState:
        """A new state of these rows, in this order; a row may come several times."""
        index = [int(row) for row in rows]
        return RecurrentState([buffer.rows(index) for buffer in self.current], self.position[index], self.device)

    def move_into(self, current: list[Buffer], spare: list[Buffer]) -> None:
        """Keep the state in other buffers on the same GPU from now on, with their spare ones."""
        for target, source in zip(current, self.current, strict=True):
            assert isinstance(target, DeviceBuffer)
            target.copy(source)
        self.current, self._spare = current, spare
        self.bindings.clear()

    def advance(self, tokens: int | Array, *, swap: bool) -> None:
        """Rows move on by one number of tokens or `[B]` of their own; `swap` where the spare buffers were written."""
        if swap:
            self.current, self._spare = self.spare, self.current
        self.position = self.position + tokens
