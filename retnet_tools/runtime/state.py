"""The recurrent state of a batch of sequences, held where the session runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from retnet_tools.errors import UsageError
from retnet_tools.graph.contract import state_shape
from retnet_tools.graph.manifest import Manifest
from retnet_tools.runtime.cuda import cuda_runtime
from retnet_tools.runtime.device_memory import device_room
from retnet_tools.weights import Array

if TYPE_CHECKING:
    import onnxruntime

    from retnet_tools.runtime.providers import Device


class RecurrentState:
    """States and the position they stand at: neither is valid without the other.

    A graph reads `current`. One that may write where it reads does so; another writes `spare`, and the two change
    places after it. Spare buffers are made when a graph first needs them.

    Args:
        states: one `[B, H, K, V]` a layer; on the CPU these arrays become the state, so they must be the caller's own.
        position: `[B]`.
        device: where to keep them.

    Attributes:
        current: one `[B, H, K, V]` a layer, S of Eq. 6.
        position: `[B]` int64, the position of the next token of each row.
        bindings: what graphs have bound to these buffers, kept here so that it goes when they go.
    """

    def __init__(self, states: Sequence[Array], position: Array, device: Device) -> None:
        self.device = device
        self.current = [device_value(state, device) for state in states]
        self.position = np.array(position, dtype=np.int64)
        self.bindings: dict[Any, Any] = {}
        self._layouts = [(state.shape, state.dtype) for state in states]
        self._spare: list[onnxruntime.OrtValue] | None = None

    @classmethod
    def zeros(cls, manifest: Manifest, batch: int, device: Device) -> RecurrentState:
        """The state before the first token: S_0 = 0 at position 0.

        Raises:
            UsageError: a batch below 1.
            ProviderError: no memory on the device.
        """
        if batch < 1:
            raise UsageError(f"a batch of {batch}", "at least one sequence")
        shape, layers = (batch, *state_shape(manifest.config)), range(manifest.config.num_layers)
        position = np.zeros(batch, dtype=np.int64)
        if device.kind == "cpu":
            return cls([np.zeros(shape, dtype=manifest.state_dtype) for _ in layers], position, device)
        state = cls._with_room([(shape, np.dtype(manifest.state_dtype)) for _ in layers], position, device)
        for value in state.current:
            cuda_runtime(device.index).clear(value)
        return state

    @classmethod
    def _with_room(cls, layouts: list[Any], position: Array, device: Device) -> RecurrentState:
        """A state in new buffers, their content undefined."""
        state = cls([], position, device)
        state._layouts = layouts
        state.current = [device_room(shape, dtype, device) for shape, dtype in layouts]
        return state

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.position)

    @property
    def spare(self) -> list[onnxruntime.OrtValue]:
        """Buffers of the same shapes for a graph that may not write where it reads."""
        if self._spare is None:
            self._spare = [device_room(shape, dtype, self.device) for shape, dtype in self._layouts]
        return self._spare

    def release_spare(self) -> None:
        """Give the spare buffers back, with whatever is bound to them."""
        self._spare = None
        self.bindings.clear()

    def numpy(self) -> list[Array]:
        """A copy of the states, one `[B, H, K, V]` a layer."""
        return [np.array(value.numpy()) for value in self.current]

    def select(self, rows: Sequence[int]) -> RecurrentState:
        """A new state of these rows, in this order; a row may come several times."""
        index = np.asarray(rows, dtype=np.int64)
        if self.device.kind == "cpu":
            return RecurrentState([value.numpy()[index] for value in self.current], self.position[index], self.device)
        layouts = [((len(index), *shape[1:]), dtype) for shape, dtype in self._layouts]
        chosen = self._with_room(layouts, self.position[index], self.device)
        for target, source in zip(chosen.current, self.current, strict=True):
            cuda_runtime(self.device.index).copy_rows(target, source, index.tolist())
        return chosen

    def move_into(self, current: list[onnxruntime.OrtValue], spare: list[onnxruntime.OrtValue]) -> None:
        """Keep the state in other buffers on the same device from now on, with their spare ones."""
        for target, source in zip(current, self.current, strict=True):
            cuda_runtime(self.device.index).copy_rows(target, source, range(self.batch))
        self.current, self._spare = current, spare
        self.bindings.clear()

    def advance(self, tokens: int | Array, *, swap: bool) -> None:
        """Rows move on by one number of tokens or `[B]` of their own; `swap` where the spare buffers were written."""
        if swap:
            self.current, self._spare = self.spare, self.current
        self.position = self.position + tokens


def device_value(array: Array, device: Device) -> onnxruntime.OrtValue:
    """An array as a value on a device; on the CPU it is a view of the array."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device.kind, device.index)
