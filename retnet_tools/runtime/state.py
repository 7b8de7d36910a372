"""The recurrent state of a batch of sequences, held where the session runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from retnet_tools.graph.contract import state_shape
from retnet_tools.graph.manifest import Manifest
from retnet_tools.weights import Array

if TYPE_CHECKING:
    import onnxruntime

    from retnet_tools.runtime.providers import Device


@dataclass
class RecurrentState:
    """States and the position they stand at: neither is valid without the other.

    Attributes:
        current: one `[B, H, K, V]` a layer, S of Eq. 6.
        spare: buffers of the same shapes that the next call writes into; the two change places after it.
        position: `[B]` int64, the position of the next token of each row.
    """

    current: list[onnxruntime.OrtValue]
    spare: list[onnxruntime.OrtValue]
    position: Array

    @classmethod
    def zeros(cls, manifest: Manifest, batch: int, device: Device) -> RecurrentState:
        """The state before the first token: S_0 = 0 at position 0."""
        import onnxruntime

        shape = (batch, *state_shape(manifest.config))

        def buffer() -> onnxruntime.OrtValue:
            # On the CPU an OrtValue is a view of its array, so each needs an array of its own.
            zero = np.zeros(shape, dtype=manifest.state_dtype)
            return onnxruntime.OrtValue.ortvalue_from_numpy(zero, device.kind, device.index)

        def buffers() -> list[onnxruntime.OrtValue]:
            return [buffer() for _ in range(manifest.config.num_layers)]

        return cls(buffers(), buffers(), np.zeros(batch, dtype=np.int64))

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.position)

    def numpy(self) -> list[Array]:
        """A copy of the states, one `[B, H, K, V]` a layer."""
        return [np.array(value.numpy()) for value in self.current]

    def advance(self, tokens: int | Array) -> None:
        """What was written becomes current, and rows move on by one number of tokens or `[B]` of their own."""
        self.current, self.spare = self.spare, self.current
        self.position = self.position + tokens
