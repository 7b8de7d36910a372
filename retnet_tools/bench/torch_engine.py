"""Our torch recurrent form as a measured implementation. The only file of these that imports torch."""

from __future__ import annotations

from retnet_tools.bench.engines import empty_states, placed_states
from retnet_tools.bench.specs import TorchSpec
from retnet_tools.bench.torch_decoder import RecurrentDecoder
from retnet_tools.random_weights import RandomWeights
from retnet_tools.weights import Array, canonical_shapes


class TorchEngine:
    """Steps in torch; states are float32."""

    captured: bool | None = None
    prompt_at_once: int | None = 1

    def __init__(self, spec: TorchSpec) -> None:
        weights = RandomWeights(canonical_shapes(spec.config))
        self._config, self.device = spec.config, spec.device
        self._decoder = RecurrentDecoder(spec.config, weights, spec.dtype, spec.threads, str(spec.device))
        self.vocab_size = spec.config.vocab_size

    def place(self, batch: int, depth: int | Array, room: int) -> None:
        """Random states at a position, or zero states at position 0."""
        make = placed_states if depth else empty_states
        self._decoder.place(list(make(self._config, batch, "float32")), int(depth))

    def feed(self, input_ids: Array) -> Array:
        """Token by token."""
        return self._decoder.feed(input_ids)

    def release(self) -> None:
        """Drop the states."""
        self._decoder.place([], 0)
