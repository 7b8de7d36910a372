"""A model one block at a time, for work on weights that looks at activations: `embed`, then the retention and the
feed-forward block of each layer (2L of them), then the head.

Everything runs in float32 on the CPU, in the chunkwise form (Eq. 7), on whole sequences from zero states and position
0. Memory: the weights of one block and the activations of one call.

Between the two blocks of a layer with a parallel residual the stream is two hidden states side by side, the layer's
input, which both blocks read, and what is added up so far: `stream_width` says how wide it is.

Shapes: B sequences, T tokens, D hidden size, W width of the stream (D, or 2 D), N and K outputs and inputs of a matrix.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from retnet_tools.config import RetNetConfig
from retnet_tools.model.norms import Norm
from retnet_tools.model.position_terms import terms_at
from retnet_tools.model.retention import retention_chunkwise
from retnet_tools.model.retnet import Layer, RetNet, to_torch
from retnet_tools.weights import Array, WeightSource, canonical_shapes

EMBEDDING = "embedding.weight"
Part = Literal["retention", "ffn"]
_ENTRIES: dict[Part, tuple[str, ...]] = {
    "retention": ("q_proj", "k_proj", "v_proj", "gate_proj"),
    "ffn": ("gate_proj", "up_proj"),
}
_EXITS: dict[Part, str] = {"retention": "out_proj", "ffn": "down_proj"}


class Block:
    """A block with its norm and its residual connection, x `[B, T, W]` to `[B, T, W]`.

    Attributes:
        name: such as `layers.0.retention`.
        matrices: the canonical names of its weights `[N, K]`, in two steps: all of a step read the same input.

    Args:
        weights: where its tensors are read from.
        index: 0 to 2L - 1, in the order of the model.
    """

    def __init__(self, config: RetNetConfig, weights: WeightSource, index: int) -> None:
        self._config = config
        part: Part = "ffn" if index % 2 else "retention"
        layer = f"layers.{index // 2}."
        self.name = f"{layer}{part}"
        shapes = canonical_shapes(config)
        norm = "retention" if config.shared_block_norm else part
        names = [name for name in shapes if name.startswith((f"{self.name}.", f"{layer}{norm}_norm."))]
        entries = (f"{self.name}.{linear}.weight" for linear in _ENTRIES[part])
        self.matrices = (
            tuple(name for name in entries if name in shapes),
            (f"{self.name}.{_EXITS[part]}.weight",),
        )
        with torch.device("meta"):
            self._layer = Layer(config)
        # The other half of the layer stays without data.
        tensors = {name.removeprefix(layer): _float32(weights.read(name)) for name in names}
        self._layer.load_state_dict(tensors, strict=False, assign=True)
        self._layer.requires_grad_(False)
        self._prefix, self._is_retention = layer, part == "retention"

    @property
    def _norm(self) -> Norm:
        return self._layer.retention_norm if self._is_retention else self._layer.norm_of_ffn

    def matrix(self, name: str) -> Array:
        """A weight `[N, K]` by its canonical name."""
        return self._parameter(name).data.numpy()

    def set_matrix(self, name: str, values: Array) -> None:
        """Replace a weight `[N, K]`."""
        self._parameter(name).data = torch.from_numpy(values)

    def inputs(self, step: int, x: Array) -> Array:
        """What the matrices of a step read, `[B T, K]`."""
        # The layer's input comes first in a stream that holds more.
        entry = self._layer.block_input(self._norm, torch.from_numpy(x[..., : self._config.hidden_size]))
        y = entry if step == 0 else self._inner(entry)
        return y.flatten(0, 1).numpy()  # [B, T, K] -> [B T, K]

    def __call__(self, x: Array) -> Array:
        """The residual stream after the block, `[B, T, W]`."""
        return self.after(x, self.inputs(1, x))

    def after(self, x: Array, inputs: Array) -> Array:
        """The residual stream after the block, `[B, T, W]`, where what its second step reads is known.

        Args:
            x: the stream before it, `[B, T, W]`.
            inputs: `inputs(1, x)`, `[B T, K]`.
        """
        stream = torch.from_numpy(x)
        last = self._layer.retention.out_proj if self._is_retention else self._layer.ffn.down_proj
        y = last(torch.from_numpy(inputs)).unflatten(0, x.shape[:2])  # [B T, D] -> [B, T, D]
        if not self._config.parallel_residual:
            after: Array = self._layer.add(self._norm, stream, y).numpy()
        elif self._is_retention:
            after = torch.cat((stream, self._layer.add(self._norm, stream, y)), dim=-1).numpy()
        else:
            after = (stream[..., self._config.hidden_size :] + y).numpy()
        return after

    def _inner(self, entry: Tensor) -> Tensor:
        """What the matrix of the second step reads."""
        if not self._is_retention:
            return self._layer.ffn.expand(entry)
        terms = terms_at(self._config, torch.arange(entry.shape[1])[None], entry.dtype)
        return self._layer.retention.mix(entry, terms, None, retention_chunkwise)[0]

    def _parameter(self, name: str) -> nn.Parameter:
        return self._layer.get_parameter(name.removeprefix(self._prefix))


class Head:
    """The final norms and the output projection: hidden states x `[B, T, D]` to logits.

    Args:
        matrix: the weight of the projection, `[vocab, D]` float32.
    """

    def __init__(self, config: RetNetConfig, weights: WeightSource, matrix: Array) -> None:
        self._model = _without_layers(config, weights, head_matrix(config), matrix)

    def inputs(self, x: Array) -> Array:
        """What the projection reads, `[B T, D]`."""
        return self._model.normed(torch.from_numpy(x)).flatten(0, 1).numpy()  # [B, T, D] -> [B T, D]

    def logits(self, x: Array) -> Array:
        """Logits `[B T, vocab]`."""
        return self._model.head(torch.from_numpy(x)).flatten(0, 1).numpy()  # [B, T, vocab] -> [B T, vocab]


def block_count(config: RetNetConfig) -> int:
    """Blocks of a model: two a layer."""
    return 2 * config.num_layers


def stream_width(config: RetNetConfig, index: int) -> int:
    """W of the stream before a block, index 0 to 2L."""
    return config.hidden_size * (2 if config.parallel_residual and index % 2 else 1)


def head_matrix(config: RetNetConfig) -> str:
    """The canonical name of the output projection's weight, which a tied model shares with the embedding."""
    return EMBEDDING if config.tie_word_embeddings else "lm_head.weight"


def embed(config: RetNetConfig, weights: WeightSource, matrix: Array, ids: Array) -> Array:
    """The residual stream before the first block, `[B, T, D]`.

    Args:
        matrix: the embedding, `[vocab, D]` float32.
        ids: tokens `[B, T]`.
    """
    return _without_layers(config, weights, EMBEDDING, matrix).embed(torch.from_numpy(ids)).numpy()


def _without_layers(config: RetNetConfig, weights: WeightSource, name: str, matrix: Array) -> RetNet:
    """The norms around the layers, the bias of the head and one of the two matrices; all else stays without data."""
    with torch.device("meta"):
        model = RetNet(replace(config, num_layers=1))
    names = (name for name, shape in canonical_shapes(config).items() if len(shape) == 1 and "layers." not in name)
    tensors = {name: _float32(weights.read(name)) for name in names}
    model.load_state_dict({**tensors, name: torch.from_numpy(matrix)}, strict=False, assign=True)
    return model.requires_grad_(False)


def _float32(array: Array) -> Tensor:
    return to_torch(array).float()
