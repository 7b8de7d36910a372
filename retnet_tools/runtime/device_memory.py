"""Device memory: what a graph, states and a chunk of a prompt need, held against what is free before it is asked for.

Sizes in bytes. Weights are counted once for each graph that is open, step.onnx and decoder.onnx being sessions of their
own, unless they share them (`opening.SharedWeights`). What they need besides is estimated, on the high side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from retnet_tools.config import RetNetConfig
from retnet_tools.dtypes import NUMPY_DTYPES, parse_dtype
from retnet_tools.errors import ProviderError
from retnet_tools.graph.code_types import CODE_TYPES
from retnet_tools.graph.contract import state_shape
from retnet_tools.graph.manifest import Manifest
from retnet_tools.runtime.failures import OutOfMemoryError, failure_type
from retnet_tools.runtime.providers import Device

if TYPE_CHECKING:
    import onnx_ir as ir

SMALLER = f"a smaller batch, --dtype fp16, --quantize {' or '.join(CODE_TYPES)}, another device, or --device cpu"
"""What to do where the memory of a device does not suffice."""
LIBRARY_BYTES = 256 << 20
"""Room for kernels that are loaded when they are first needed, and for cuBLAS: 32 MiB a handle since 9.0."""


def graph_bytes(path: Path) -> int:
    """Weights and tables of a graph."""
    # It takes half a second to import; nothing on the CPU needs it.
    import onnx_ir as ir

    from retnet_tools.graph.folder import load_graph

    tensors = (value.const_value for value in load_graph(path).initializers.values())
    return sum(tensor_bytes(tensor) for tensor in tensors if isinstance(tensor, ir.ExternalTensor))


def tensor_bytes(tensor: ir.ExternalTensor) -> int:
    """Of one of them, packed."""
    return math.ceil(tensor.size * tensor.dtype.itemsize)


def state_bytes(manifest: Manifest, batch: int, *, buffers: int) -> int:
    """States of a batch in one or two sets of buffers, and its logits."""
    config, itemsize = manifest.config, NUMPY_DTYPES[parse_dtype(manifest.state_dtype)].itemsize
    state = config.num_layers * math.prod(state_shape(config)) * itemsize
    return batch * (buffers * state + 4 * (config.vocab_size or config.hidden_size))


def chunk_bytes(config: RetNetConfig, dtype: str, batch: int, tokens: int) -> int:
    """Activations that live at once while a chunk runs through a layer.

    Two copies of q, k, v and the gate or of the feed-forward's two halves in the weights' type, three of q, k, v in
    float32, and of the T x T scores of each head three.
    """
    itemsize = NUMPY_DTYPES[parse_dtype(dtype)].itemsize
    merged = max(2 * config.key_dim + 2 * config.value_dim, 2 * config.feed_forward.dim)
    wide = 2 * config.key_dim + config.value_dim
    row = 2 * itemsize * (merged + 2 * config.hidden_size) + 3 * 4 * wide
    return batch * (tokens * row + 3 * 4 * config.num_heads * tokens**2)


def check_device_memory(device: Device, needed: int, what: str) -> None:
    """Check that a device with memory of its own has room, before anything is loaded.

    Args:
        what: it is needed for, as the error says it.

    Raises:
        ProviderError: it has not.
    """
    if device.provider.memory is None:
        return
    free, total = device.provider.memory(device.index)
    if needed > free:
        raise ProviderError(f"{what} needs {_gigabytes(needed)} on {device}, where {_room(free, total)}", "", SMALLER)


@contextmanager
def enough_memory(device: Device, what: str, needed: int | None = None) -> Iterator[None]:
    """Turn a failed allocation of CUDA, its libraries or ONNX Runtime into an error that says what it was for.

    Args:
        what: it was for, as the error says it.
        needed: bytes for it, as far as is known.

    Raises:
        OutOfMemoryError: in place of the error that came.
    """
    try:
        yield
    except Exception as error:
        if device.provider.memory is None or failure_type(error) is not OutOfMemoryError:
            raise
        room = _room(*device.provider.memory(device.index))
        amount = "more memory" if needed is None else f"about {_gigabytes(needed)} more"
        raise OutOfMemoryError(f"{what} needs {amount} on {device}, where {room}", "", SMALLER) from error


def _room(free: int, total: int) -> str:
    return f"{_gigabytes(free)} of {_gigabytes(total)} are free"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
