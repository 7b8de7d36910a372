"""Torch's recurrent form one token at a time: to measure against, and in float64 as what is right.

The only file of the bench that imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retnet_tools.bench.engines import empty_states, placed_states
from retnet_tools.bench.specs import TorchSpec
from retnet_tools.config import RetNetConfig
from retnet_tools.dtypes import FloatName
from retnet_tools.errors import UsageError
from retnet_tools.model.position_terms import terms_at
from retnet_tools.model.retention import retention_recurrent
from retnet_tools.model.retnet import RetNet, load_model, to_torch
from retnet_tools.random_weights import RandomWeights
from retnet_tools.weights import Array, WeightSource, canonical_shapes


class RecurrentDecoder:
    """A model in torch that reads tokens in the recurrent form (Eq. 6).

    Args:
        weights: by canonical name.
        dtype: to compute in.
        threads: of torch on the CPU, from now on; None leaves its choice.
        device: where to compute, as torch names it.
    """

    def __init__(
        self, config: RetNetConfig, weights: WeightSource, dtype: FloatName, threads: int | None, device: str = "cpu"
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._model, self._device = load_model(config, weights, getattr(torch, dtype)).to(device), device
        self._states: list[Tensor] = []
        self._position = 0

    def place(self, states: Sequence[Array], position: int) -> None:
        """Go on from states `[B, H, K, V]` of all layers, whose rows stand at a position."""
        self._states = [torch.from_numpy(state).to(self._device) for state in states]
        self._position = position

    def feed(self, input_ids: Array) -> Array:
        """Feed tokens `[B, T]`; logits `[B, vocab]` float32 after the last of them."""
        with torch.inference_mode():
            output = self._model(
                torch.from_numpy(input_ids).to(self._device),
                form=retention_recurrent,
                states=self._states,
                position=self._position,
            )
        self._states = output.states
        self._position += input_ids.shape[1]
        logits: Array = output.logits[:, -1].float().cpu().numpy()
        return logits


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


def has_device(device: str) -> bool:
    """Whether torch can compute there: `cpu`, or `cuda:N`."""
    kind, _, index = device.partition(":")
    return kind == "cpu" or (torch.cuda.is_available() and int(index or 0) < torch.cuda.device_count())


def reference_logits(
    config: RetNetConfig, weights: WeightSource, input_ids: Array, states: Sequence[Array], positions: Array
) -> Array:
    """Logits in float64 of one token for each row, by the recurrent form, one layer in memory at a time.

    Args:
        weights: by canonical name.
        input_ids: `[B]`.
        states: `[B, H, K, V]` a layer.
        positions: `[B]`, of the tokens.

    Returns:
        `[B, vocab]` float64.

    Raises:
        UsageError: a stack without a vocabulary.
    """
    if not config.has_vocabulary:
        raise UsageError("a stack without embedding and head", "a model with a vocabulary")
    with torch.device("meta"):
        model = RetNet(config)
    names = [name for name in canonical_shapes(config) if not name.startswith("layers.")]
    _load(model, weights, names)
    with torch.inference_mode():
        x = model.embed(torch.from_numpy(input_ids[:, None]))
        terms = terms_at(config, torch.from_numpy(positions[:, None]), torch.float64)
        for i, (layer, state) in enumerate(zip(model.layers, states, strict=True)):
            _load(model, weights, [name for name in canonical_shapes(config) if name.startswith(f"layers.{i}.")])
            x, _ = layer(x, terms, torch.from_numpy(state).double(), retention_recurrent)
            layer.to("meta")
        logits: Array = model.head(x)[:, 0].numpy()
    return logits


def _load(model: RetNet, weights: WeightSource, names: Sequence[str]) -> None:
    tensors = {name: to_torch(weights.read(name)).double() for name in names}
    model.load_state_dict(tensors, strict=False, assign=True)
