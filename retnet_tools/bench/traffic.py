"""What a token must move and compute, whatever the implementation: bytes of memory, and products.

A step reads every weight once for all sequences, but for the embedding, of which it looks a row up (a tied one is the
output head and is read). For each sequence it reads and writes the states, or reads a KV cache and writes a token's
part of it, and writes the logits. A prompt is read in chunks, each of which does the same once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from retnet_tools.bench.transformer_graph import TransformerConfig, transformer_shapes
from retnet_tools.config import RetNetConfig
from retnet_tools.graph.code_types import matrix_bytes
from retnet_tools.graph.contract import STEP_FILE, state_shape
from retnet_tools.graph.folder import load_graph
from retnet_tools.graph.nodes import ELEMENT_TYPES
from retnet_tools.graph.ops import LOOKUPS
from retnet_tools.graph.quantization import Scheme
from retnet_tools.weights import canonical_shapes

_FLOAT32 = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes and products of one model.

    Attributes:
        parameters: of the model.
        weight_bytes: read once a step.
        logit_bytes: written for each sequence.
        fixed_state: bytes of the states of a sequence; 0 with a KV cache.
        cache_per_token: bytes of a token in the KV cache; 0 with states.
        linear_flops: of the linear layers that every token of a prompt goes through, 2 a weight.
        state_flops: of reading and updating the states for a token; 0 with attention.
        score_flops: of retention for a token and a token of its chunk; 0 with attention.
        attention_flops: of attention for a token and a token before it; 0 with retention.
        chunk_size: tokens of a prompt that are read at once; None reads it whole.
    """

    parameters: int
    weight_bytes: int
    logit_bytes: int
    fixed_state: int
    cache_per_token: int
    linear_flops: int
    state_flops: int
    score_flops: int
    attention_flops: int
    chunk_size: int | None

    def state_bytes(self, context: int) -> int:
        """Bytes that a sequence of so many tokens keeps."""
        return self.fixed_state + self.cache_per_token * context

    def decode_bytes(self, batch: int, context: float) -> float:
        """Bytes a token of a step over `batch` sequences that hold `context` tokens each."""
        state = 2 * self.fixed_state + self.cache_per_token * (context + 1)
        return self.weight_bytes / batch + state + self.logit_bytes

    def prefill_bytes(self, batch: int, tokens: int, depth: int) -> float:
        """Bytes a token of reading a prompt after `depth` tokens."""
        chunks = 1 if self.chunk_size is None else math.ceil(tokens / self.chunk_size)
        state = 2 * self.fixed_state * chunks + self.cache_per_token * (depth + tokens)
        return (self.weight_bytes * chunks / batch + state + self.logit_bytes) / tokens

    def prefill_flops(self, tokens: int, depth: int) -> float:
        """Floating-point operations a token of reading a prompt after `depth` tokens."""
        attention = self.attention_flops * (depth + (tokens + 1) / 2)
        return self.linear_flops + self.state_flops + self.score_flops * self._chunk(tokens) + attention

    def _chunk(self, tokens: int) -> float:
        """Tokens of the chunk that a token of a prompt is in, mean over the prompt."""
        size = tokens if self.chunk_size is None else self.chunk_size
        rest = tokens % size
        return ((tokens - rest) * size + rest**2) / tokens


def retnet_traffic(
    config: RetNetConfig, dtype: str, scheme: Scheme | None, state_dtype: str, chunk_size: int
) -> Traffic:
    """Of a RetNet in its recurrent and chunkwise forms.

    Retention in a chunk of C tokens takes 2 C (K + V) for the scores and what they weigh, and 4 K V for reading and
    updating the state, in each head (Eq. 7).
    """
    shapes = canonical_shapes(config)
    heads, k, v = state_shape(config)
    return Traffic(
        parameters=sum(map(math.prod, shapes.values())),
        weight_bytes=weight_bytes(shapes, dtype, scheme, tied=config.tie_word_embeddings),
        logit_bytes=_FLOAT32 * (config.vocab_size or config.hidden_size),
        fixed_state=config.num_layers * heads * k * v * _itemsize(state_dtype),
        cache_per_token=0,
        linear_flops=_linear_flops(shapes, config.num_layers),
        state_flops=config.num_layers * heads * 4 * k * v,
        score_flops=config.num_layers * heads * 2 * (k + v),
        attention_flops=0,
        chunk_size=chunk_size,
    )


def transformer_traffic(config: TransformerConfig, dtype: str, scheme: Scheme | None) -> Traffic:
    """Of a Transformer with a KV cache in the type of its activations."""
    shapes = transformer_shapes(config)
    return Traffic(
        parameters=sum(map(math.prod, shapes.values())),
        weight_bytes=weight_bytes(shapes, dtype, scheme, tied=config.tie_word_embeddings),
        logit_bytes=_FLOAT32 * config.vocab_size,
        fixed_state=0,
        cache_per_token=2 * config.num_layers * config.num_kv_heads * config.head_size * _itemsize(dtype),
        linear_flops=_linear_flops(shapes, config.num_layers),
        state_flops=0,
        score_flops=0,
        attention_flops=4 * config.num_layers * config.hidden_size,
        chunk_size=None,
    )


def weight_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: str, scheme: Scheme | None, *, tied: bool) -> int:
    """Bytes of the weights that a step reads whole: all but an embedding that is only looked up in."""
    total = 0
    for name, shape in shapes.items():
        if name == "embedding.weight" and not tied:
            continue
        format = scheme.format_of(name) if scheme is not None and len(shape) == 2 else None
        total += matrix_bytes(shape, format, _itemsize(dtype))
    return total


def bytes_read_whole(folder: Path, graph: str = STEP_FILE) -> int:
    """Bytes of the stored tensors that one run of a graph reads from end to end.

    Left out are those that it only looks rows up in: an embedding, and the tables of positions.

    Raises:
        InputError: the graph cannot be read.
    """
    total = 0
    for value in load_graph(folder / graph).initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and any(use.node.op_type not in LOOKUPS for use in value.uses()):
            total += math.ceil(math.prod(tensor.shape.numpy()) * tensor.dtype.itemsize)
    return total


def _linear_flops(shapes: Mapping[str, tuple[int, ...]], layers: int) -> int:
    """Embedding, output head and the feed-forward network of the last layer see one token of a prompt, or none."""
    last = f"layers.{layers - 1}."
    return 2 * sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if len(shape) == 2 and name.startswith("layers.") and not (name.startswith(last) and ".ffn." in name)
    )


def _itemsize(dtype: str) -> int:
    return math.ceil(ELEMENT_TYPES[dtype].itemsize)
