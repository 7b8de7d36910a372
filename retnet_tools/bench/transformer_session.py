"""Runs the Transformer of `retnet_tools.bench.transformer_graph`: a KV cache of fixed room, written in place."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retnet_tools.bench.transformer_graph import (
    SEQLENS,
    TOTAL_LENGTH,
    TRANSFORMER_FILE,
    TransformerConfig,
    cache_names,
)
from retnet_tools.errors import UsageError
from retnet_tools.graph.contract import INPUT_IDS, LOGITS, TensorSpec
from retnet_tools.graph.nodes import ELEMENT_TYPES
from retnet_tools.runtime.buffers import Binding, buffer_of
from retnet_tools.runtime.failures import CaptureError
from retnet_tools.runtime.onnx_session import open_session
from retnet_tools.runtime.providers import Device
from retnet_tools.weights import Array

if TYPE_CHECKING:
    import onnxruntime


class KeyValues:
    """The KV cache of a batch whose rows hold equally many tokens.

    Args:
        buffers: keys and values of each layer in turn, `[B, G, room, D]`; on the CPU these arrays become the cache.
        shape: of each.
        tokens: how many each row holds.

    Attributes:
        bindings: what the graph has bound to these buffers.
    """

    def __init__(self, buffers: Iterable[Array], shape: tuple[int, ...], tokens: int, device: Device) -> None:
        self.batch, _, self.room, _ = shape
        self.buffers = [buffer_of(buffer, device) for buffer in buffers]
        self.tokens = tokens
        self.bindings: dict[Any, Binding] = {}


class TransformerSession:
    """A folder with `transformer.onnx` on one device. On CUDA, single tokens are captured as a CUDA graph and replayed.

    A capture runs the graph several times; writing the same keys and values to the same place again changes nothing.

    Args:
        folder: where the graph and weights.data are.
        config, dtype: of the graph.
        cuda_graph: whether steps on CUDA are captured and replayed; None does where it can.

    Attributes:
        eager_reason: why steps run kernel by kernel; None where they are replayed as CUDA graphs.

    Raises:
        ProviderError: the device cannot be had, or has no kernel for the graph.
    """

    def __init__(
        self,
        folder: Path,
        config: TransformerConfig,
        dtype: str,
        device: Device,
        threads: int | None = None,
        *,
        cuda_graph: bool | None = None,
    ) -> None:
        self.config, self.dtype, self.device = config, ELEMENT_TYPES[dtype].numpy(), device
        self.eager_reason = device.provider.eager_reason
        if self.eager_reason is None and cuda_graph is False:
            self.eager_reason = "it was asked for"
        self._session = self._open(folder / TRANSFORMER_FILE, threads)
        self._output = TensorSpec(LOGITS, "float32", ("batch", 1, config.vocab_size))
        self._graph_ids = itertools.count(1)

    def _open(self, path: Path, threads: int | None) -> onnxruntime.InferenceSession:
        if self.eager_reason is None:
            try:
                return open_session(path, self.device, threads, cuda_graph=True)
            except CaptureError as error:
                self.eager_reason = error.found
        return open_session(path, self.device, threads)

    def new_cache(
        self, batch: int, room: int, tokens: int = 0, fill: Callable[[tuple[int, ...]], Array] = np.zeros
    ) -> KeyValues:
        """A cache with room for so many tokens.

        Args:
            tokens: how many are there already.
            fill: the content of one buffer by its shape.

        Raises:
            UsageError: more room than the rotary tables have rows.
        """
        if room > self.config.max_positions:
            raise UsageError(f"{room} tokens in a cache", f"at most {self.config.max_positions}")
        shape = self.config.cache_shape(batch, room)
        buffers = (np.asarray(fill(shape), dtype=self.dtype) for _ in range(2 * self.config.num_layers))
        return KeyValues(buffers, shape, tokens, self.device)

    def run(self, input_ids: Array, cache: KeyValues) -> Array:
        """Feed tokens `[B, T]`; logits `[B, vocab]` after the last of them. Moves the cache on.

        Raises:
            UsageError: a full cache, or several tokens for several rows that hold some already.
        """
        batch, tokens = input_ids.shape
        total = cache.tokens + tokens
        if total > cache.room:
            raise UsageError(f"{total} tokens in a cache", f"at most {cache.room}, its room")
        if tokens > 1 and cache.tokens and batch > 1:
            raise UsageError(
                f"{tokens} tokens for each of {batch} rows that hold {cache.tokens}",
                "one row, or empty ones: GroupQueryAttention reads no others",
            )
        captured = tokens == 1 and self.eager_reason is None
        feeds = {
            INPUT_IDS: input_ids,
            SEQLENS: np.full(batch, total - 1, dtype=np.int32),
            # An upper bound will do, and in a captured graph it is what it was; each row ends where SEQLENS says.
            TOTAL_LENGTH: np.array(cache.room if captured and cache.room > 1 else total, dtype=np.int32),
        }
        if tokens not in cache.bindings:
            cache.bindings[tokens] = self._bind(feeds, cache, captured=captured)
        logits = cache.bindings[tokens].run(feeds, fetch=True)
        cache.tokens = total
        assert logits is not None
        # One row of logits is asked for.
        return np.asarray(logits[:, 0])

    def _bind(self, feeds: Mapping[str, Array], cache: KeyValues, *, captured: bool) -> Binding:
        names = [pair for i in range(self.config.num_layers) for pair in cache_names(i)]
        past = {name: value for (name, _), value in zip(names, cache.buffers, strict=True)}
        present = {name: value for (_, name), value in zip(names, cache.buffers, strict=True)}
        graph_id = next(self._graph_ids) if captured else None
        if graph_id is not None:
            weakref.finalize(cache, self._session.release_captured_graph, graph_id).atexit = False
        return Binding(self._session, feeds, past, present, self._output, self.device, graph_id)
