"""What an export is held to: the model in float64, and how far rounding may take a run from it at each place.

Memory: one layer in float64 (before and after the layers the vocabulary's matrix), the activations of the model and its
noisy copies, and in float32 the states that are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import UsageError
from retnet_tools.machine import available_memory
from retnet_tools.model.layerwise import EMBEDDING, head_matrix
from retnet_tools.model.noise import Noise, NoisyCopies
from retnet_tools.model.position_terms import terms_at
from retnet_tools.model.retention import retention_chunkwise
from retnet_tools.model.retnet import Layer, RetNet, to_torch
from retnet_tools.progress import Progress
from retnet_tools.weights import Array, WeightSource, canonical_shapes, parameter_count

_CHUNK_SIZE = 32
_WRITES = 4
"""Tokens whose writes of a state count as one, where copies lose by them."""
_LOGIT_ROWS = 64
"""Tokens, copies counted, whose logits are there at once."""


@dataclass(frozen=True)
class Walk:
    """Tokens to run through the model.

    Attributes:
        tokens: ids `[B, T]`, or embeddings `[B, T, D]`.
        position: of the first token of each row, `[B]`.
        cuts: after how many tokens the states are asked for.
        states: before the first token, one `[B, H, K, V]` a layer; None for zeros.
    """

    tokens: Array
    position: Array
    cuts: tuple[int, ...]
    states: Sequence[Array] | None = None


@dataclass
class Expected:
    """What a walk gives in float64.

    Attributes:
        logits: `[B, T, vocab]`; hidden states of a stack without a head.
        logits_apart: for each noise, how far its copies' logits are at most, `[B, T]`.
        states: by cut, one `[B, H, K, V]` float32 a layer.
        states_apart: by cut and layer, the same of states, for each noise `[B, H]`.
    """

    logits: Array = field(default_factory=lambda: np.empty(0))
    logits_apart: list[Array] = field(default_factory=list)
    states: dict[int, list[Array]] = field(default_factory=dict)
    states_apart: dict[int, list[list[Array]]] = field(default_factory=dict)


def check_reference_memory(config: RetNetConfig, walks: Sequence[Walk], copies: int) -> None:
    """Refuse walks that the memory that is available cannot hold; do nothing where that is not known.

    Counted are, in float64, a layer or the vocabulary's matrix, what a layer makes of all tokens of the longest walk,
    and the streams and logits of all; and the states in float32.

    Args:
        copies: of the model, itself among them.

    Raises:
        UsageError: too many tokens.
    """
    available = available_memory()
    tokens = [walk.tokens.shape[0] * walk.tokens.shape[1] for walk in walks]
    widths = 3 * config.key_dim + 3 * config.value_dim + 3 * config.feed_forward.dim + 4 * config.hidden_size
    states = sum(len(walk.cuts) * walk.tokens.shape[0] for walk in walks) * config.num_layers
    numbers = copies * (max(tokens) * widths + sum(tokens) * config.hidden_size) + sum(tokens) * config.vocab_size
    weights = max(parameter_count(config) // config.num_layers, config.vocab_size * config.hidden_size)
    needed = 8 * (numbers + weights) + 4 * states * config.key_dim * config.head_v_dim
    if available is not None and needed > available:
        raise UsageError(
            f"{max(tokens)} tokens need about {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB are available",
            "fewer tokens",
        )


@torch.inference_mode()
def expected_runs(
    config: RetNetConfig,
    weights: WeightSource,
    walks: Sequence[Walk],
    noises: Sequence[Noise],
    progress: Progress,
    *,
    copies: int = 4,
    seed: int = 0,
) -> list[Expected]:
    """Run walks in float64, layer by layer, in the chunkwise form (Eq. 7), with noisy copies beside the model.

    Args:
        noises: the ways of computing to allow for; without any the model runs alone.
        copies: of each.
        seed: of the noise.

    Raises:
        InputError: weights that cannot be read.
        UsageError: as `check_reference_memory`.
    """
    check_reference_memory(config, walks, 1 + copies * len(noises))
    noisy, found, steps = NoisyCopies(noises, copies, seed), [Expected() for _ in walks], config.num_layers + 1
    outer = _outer(config, weights)
    streams = [_embedded(config, outer, weights, walk, noisy) for walk in walks]
    for i in range(config.num_layers):
        progress("float64 reference, layers", i, steps)
        with torch.device("meta"):
            layer = Layer(config)
        _load(layer, weights, [name for name in canonical_shapes(config) if name.startswith(f"layers.{i}.")], 2)
        with noisy.on(layer, f"layers.{i}."):
            for n, walk in enumerate(walks):
                streams[n] = _through(config, layer, i, walk, streams[n], noisy, found[n])
    progress("float64 reference, layers", config.num_layers, steps)
    if config.has_vocabulary:
        _load(outer, weights, [head_matrix(config)])
    with noisy.on(outer):
        for expected, x in zip(found, streams, strict=True):
            _judge(config, outer, x, noisy, expected)
    return found


def _outer(config: RetNetConfig, weights: WeightSource) -> RetNet:
    """What is around the layers, but for the matrices of the vocabulary."""
    with torch.device("meta"):
        model = RetNet(config)
    model.layers = nn.ModuleList()
    names = [name for name, shape in canonical_shapes(config).items() if len(shape) == 1 and "layers." not in name]
    _load(model, weights, names)
    return model


def _load(module: nn.Module, weights: WeightSource, names: Sequence[str], skip: int = 0) -> None:
    """Put tensors in their places in float64; `skip` parts of their names are those of the module."""
    tensors = {".".join(name.split(".")[skip:]): to_torch(weights.read(name)).double() for name in names}
    module.load_state_dict(tensors, strict=False, assign=True)
    module.requires_grad_(False)


def _embedded(config: RetNetConfig, outer: RetNet, weights: WeightSource, walk: Walk, noisy: NoisyCopies) -> Tensor:
    x = torch.from_numpy(walk.tokens)
    if config.has_vocabulary:
        matrix = to_torch(weights.read(EMBEDDING)).double()
        x = nn.functional.embedding(x, matrix) * config.embedding_scale
    x = noisy.moved(noisy.repeat(x.double()))
    if outer.embedding_norm is not None:
        x = noisy.moved(outer.embedding_norm(x))
    return x


def _through(
    config: RetNetConfig, layer: Layer, i: int, walk: Walk, x: Tensor, noisy: NoisyCopies, found: Expected
) -> Tensor:
    """Through one layer, and the states at the cuts put down."""
    form = partial(retention_chunkwise, chunk_size=_CHUNK_SIZE)
    state = None if walk.states is None else noisy.repeat(torch.from_numpy(walk.states[i]).double())
    start = noisy.repeat(torch.from_numpy(walk.position)).view(-1, 1)
    pieces, direction = [], None
    length = x.shape[1]
    ends = [*range(min(2 * _WRITES, length)), *range(0, length, _WRITES)] if noisy.moves_states else [0]
    for begin, end in pairwise(sorted({*ends, *walk.cuts, length})):
        terms = terms_at(config, start + torch.arange(begin, end), x.dtype)
        y, state = layer(x[:, begin:end], terms, state, form)
        pieces.append(noisy.moved(y))
        if noisy.moves_states:
            direction = noisy.normal(state) if direction is None else direction
            state = noisy.written(state, direction, end - begin)
        if end in walk.cuts:
            own, apart = noisy.apart(state)
            found.states.setdefault(end, []).append(own.float().numpy())
            found.states_apart.setdefault(end, []).append([a.amax((-2, -1)).numpy() for a in apart])
    return torch.cat(pieces, 1)


def _judge(config: RetNetConfig, outer: RetNet, x: Tensor, noisy: NoisyCopies, found: Expected) -> None:
    """The logits, some tokens at a time."""
    logits, apart = [], []
    width = max(1, _LOGIT_ROWS // len(x))
    for start in range(0, x.shape[1], width):
        y = outer.normed(x[:, start : start + width])
        if outer.lm_head is None and outer.embedding is not None:
            y = noisy.moved(nn.functional.linear(noisy.read(EMBEDDING, y), outer.embedding.weight))
        elif outer.lm_head is not None:
            y = outer.lm_head(y)
        own, moved = noisy.apart(y)
        logits.append(own.numpy())
        apart.append([a.amax(-1).numpy() for a in moved])
    found.logits = np.concatenate(logits, 1)
    found.logits_apart = [np.concatenate(pieces, 1) for pieces in zip(*apart, strict=True)]
