"""Canonical tensor names and shapes, and the lazy source they are read from.

Linear weights are stored `[out, in]` (y = x W^T), as torch does. Rows of q and k are in interleaved pairs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from retnet_tools.config import BlockNorm, RetNetConfig
from retnet_tools.errors import InputError

Array = npt.NDArray[Any]
_NAMED = 8
"""Tensors that a note names at most."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as stored."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class FileRegion(NamedTuple):
    """Bytes that lie together in a file."""

    path: Path
    offset: int
    nbytes: int


class WeightSource(ABC):
    """Tensors by name, read one at a time.

    `read` returns an array that the caller owns; nothing is kept, so memory is bounded by the tensors the caller
    holds (plus the one being read).
    """

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Names of all tensors."""

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, without reading the data."""

    @abstractmethod
    def read(self, name: str) -> Array:
        """The tensor's data (bfloat16 as `ml_dtypes.bfloat16`)."""

    def blocks(self, name: str) -> Iterator[Array]:
        """The tensor in pieces along its first axis, each contiguous and owned by the caller; here in one."""
        yield self.read(name)

    def region(self, name: str) -> FileRegion | None:
        """Where the tensor's own bytes lie, in order and in its dtype; None where they do not."""
        return None


class CountedWeights(WeightSource):
    """The tensors of another source, and how many of the values read were NaN or infinite.

    Memory: what the source gives, and a byte for each of its elements.

    Attributes:
        wrong: those values by the name of their tensor, of tensors that have any.
    """

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self.wrong: dict[str, int] = {}

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._source.names()

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, without reading the data."""
        return self._source.info(name)

    def read(self, name: str) -> Array:
        """The tensor's data."""
        return self._counted(name, self._source.read(name))

    def blocks(self, name: str) -> Iterator[Array]:
        """The tensor in pieces along its first axis."""
        return (self._counted(name, block) for block in self._source.blocks(name))

    def notes(self) -> tuple[str, ...]:
        """What the user should know of those that were read."""
        if not self.wrong:
            return ()
        named = ", ".join(f"{name} ({count})" for name, count in list(self.wrong.items())[:_NAMED])
        more = f" and {len(self.wrong) - _NAMED} more" if len(self.wrong) > _NAMED else ""
        return (f"NaN or infinite weights in {named}{more}: all that they reach is NaN",)

    def _counted(self, name: str, array: Array) -> Array:
        if wrong := _not_finite(array):
            self.wrong[name] = self.wrong.get(name, 0) + wrong
        return array


class FiniteWeights(CountedWeights):
    """The same, refusing a tensor that holds NaN or infinities when it, or its piece, is read."""

    def _counted(self, name: str, array: Array) -> Array:
        if wrong := _not_finite(array):
            raise InputError(
                f"tensor {name!r} holds {wrong} NaN or infinite value{'s' if wrong > 1 else ''}",
                "finite weights",
                "inspect lists all such tensors",
            )
        return array


def _not_finite(array: Array) -> int:
    return int(array.size - np.count_nonzero(np.isfinite(array)))


def parameter_count(config: RetNetConfig) -> int:
    """Numbers in all tensors of a model; a tied output head has none of its own."""
    return sum(map(math.prod, canonical_shapes(config).values()))


def canonical_shapes(config: RetNetConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model of this configuration, by canonical name, in storage order."""
    d, f, v = config.hidden_size, config.feed_forward.dim, config.value_dim
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, size: int, kind: BlockNorm = config.block_norm) -> None:
        shapes[f"{name}.weight"] = (size,)
        if kind.bias:
            shapes[f"{name}.bias"] = (size,)

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    if config.has_vocabulary:
        shapes["embedding.weight"] = (config.vocab_size, d)
    if config.embedding_norm:
        norm("embedding_norm", d)
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        norm(f"{layer}.retention_norm", d)
        projections = {
            "q_proj": config.key_dim,
            "k_proj": config.num_kv_heads * config.head_k_dim,
            "v_proj": config.num_kv_heads * config.head_v_dim,
        }
        if config.gate is not None:
            projections["gate_proj"] = v
        for name, rows in projections.items():
            linear(f"{layer}.retention.{name}", rows, d, config.projection_bias)
        if config.head_norm.weight != "none":
            size = config.head_v_dim if config.head_norm.weight == "shared" else v
            shapes[f"{layer}.retention.head_norm.weight"] = (size,)
            if config.head_norm.bias:
                shapes[f"{layer}.retention.head_norm.bias"] = (size,)
        linear(f"{layer}.retention.out_proj", d, v, config.projection_bias)
        if not config.shared_block_norm:
            norm(f"{layer}.ffn_norm", d)
        if config.feed_forward.kind == "glu":
            linear(f"{layer}.ffn.gate_proj", f, d, config.feed_forward.bias)
        linear(f"{layer}.ffn.up_proj", f, d, config.feed_forward.bias)
        if config.feed_forward.norm is not None:
            norm(f"{layer}.ffn.norm", f, config.feed_forward.norm)
        linear(f"{layer}.ffn.down_proj", d, f, config.feed_forward.bias)
    if config.final_norm:
        norm("final_norm", d)
    if config.output_norm is not None:
        norm("output_norm", d, config.output_norm)
    if config.has_vocabulary and not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    if config.head_bias:
        shapes["lm_head.bias"] = (config.vocab_size,)
    return shapes


def check_weights(config: RetNetConfig, source: WeightSource) -> None:
    """Check that a source holds exactly the tensors of a configuration.

    Raises:
        InputError: a tensor that is unknown, missing, of the wrong shape or not floating point, by name.
    """
    expected = canonical_shapes(config)
    names = set(source.names())
    if unknown := sorted(names - set(expected)):
        raise InputError(f"unknown tensor {unknown[0]!r}", f"the {len(expected)} tensors that the configuration names")
    for name, shape in expected.items():
        if name not in names:
            raise InputError(f"no tensor {name!r}", f"shape {list(shape)}", "the checkpoint is incomplete")
        info = source.info(name)
        if info.shape != shape:
            raise InputError(f"tensor {name!r} has shape {list(info.shape)}", f"{list(shape)}")
        if not is_floating(info.dtype):
            raise InputError(f"tensor {name!r} is {info.dtype}", "float16, bfloat16, float32 or float64")


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is one of the float types a weight may have (bfloat16 is `ml_dtypes`')."""
    return dtype.name in ("float16", "bfloat16", "float32", "float64")
