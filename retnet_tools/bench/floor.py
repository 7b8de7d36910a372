"""What the device can do at best: bytes it reads and products it computes in a second, measured beside the model.

Reading is measured over buffers several times as large as the last caches. On the CPU each thread fills its own part
of a buffer and walks it in two ways, and the best of all sizes, ways and tries counts:

    maximum   numpy's maximum of int32, one stream of reads and no writes
    compare   memcmp of the two halves, two streams of reads and no writes

On a GPU an ONNX graph negates a buffer, and bytes read and written count.

Products are measured with a single Gemm in ONNX Runtime, in the types of the model (quantized: MatMulNBits), over
several numbers of rows. On a GPU many runs are queued and waited for together.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retnet_tools.graph.builder import WeightedBuilder
from retnet_tools.graph.contract import TensorSpec
from retnet_tools.graph.nodes import graph_value
from retnet_tools.graph.ops import FusedOps
from retnet_tools.graph.weight_tensors import BuiltGraph
from retnet_tools.machine import available_memory, this_machine
from retnet_tools.runtime.buffers import Buffer, buffer_of, spare_buffer
from retnet_tools.runtime.onnx_session import open_session
from retnet_tools.runtime.providers import Device
from retnet_tools.weights import Array

if TYPE_CHECKING:
    import onnxruntime

PRODUCT_FILE = "product.onnx"
COPY_FILE = "copy.onnx"
PRODUCT_WEIGHT = "product.weight"
READ_SIZES = (1 << 27, 1 << 28, 1 << 29)
QUICK_READ_SIZES = (1 << 26,)
COPY_SIZE, QUICK_COPY_SIZE = 1 << 29, 1 << 26
_TIMES_CACHE = 4
_MEMORY_PART = 4
"""A buffer takes at most this part of the memory that is free, whatever the cache."""
_TRIES = 3
_QUEUED_RUNS = 16
ROWS = {"cpu": (128, 256, 512), "cuda": (1024, 4096, 8192)}
QUICK_ROWS = (128,)
_CACHES = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class ProductShape:
    """The weight `[rows, columns]` of a product, and the type of what it is multiplied with."""

    rows: int
    columns: int
    input_dtype: str

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The weight by name."""
        return {PRODUCT_WEIGHT: (self.rows, self.columns)}


@dataclass(frozen=True)
class ProbeSpec:
    """What measures the device itself.

    Attributes:
        folder: of the graphs.
        shape: of the weight there.
        quick: small buffers and few sizes.
    """

    device: Device
    threads: int | None
    folder: Path
    shape: ProductShape
    quick: bool


class Probes:
    """Measures a device in a process of its own; buffers and sessions are made once and kept.

    Raises:
        ProviderError: the device cannot be had.
    """

    def __init__(self, spec: ProbeSpec) -> None:
        self._spec = spec

    def bandwidth(self) -> float:
        """Bytes a second that the device reads (a GPU: reads and writes), best of several ways, sizes and tries."""
        return self._memory.bandwidth()

    def product_rate(self) -> float:
        """Floating-point operations a second in one Gemm, best of several numbers of rows and tries."""
        return self._products.rate()

    @cached_property
    def _memory(self) -> Reader | Copier:
        spec = self._spec
        if spec.device.kind == "cpu":
            return Reader(read_sizes(quick=spec.quick), spec.threads or this_machine().cores)
        return Copier(spec.device, spec.folder, QUICK_COPY_SIZE if spec.quick else COPY_SIZE)

    @cached_property
    def _products(self) -> Products:
        spec = self._spec
        rows = QUICK_ROWS if spec.quick else ROWS[spec.device.kind]
        return Products(spec.device, spec.threads, spec.folder, spec.shape, rows)


class Reader:
    """Walks a buffer on the CPU, a part of it in each of several threads.

    Args:
        sizes: bytes of the buffers to walk, one after another.
        threads: that read at once.
    """

    def __init__(self, sizes: Sequence[int], threads: int) -> None:
        self._sizes = sizes
        # A thread for each part: who fills a part reads it, so that it lies in that thread's memory.
        self._threads = [ThreadPoolExecutor(1) for _ in range(threads)]
        length = max(sizes) // threads // 4
        self._parts: list[Array] = [part.result() for part in [t.submit(_filled, length) for t in self._threads]]

    def bandwidth(self) -> float:
        """Bytes a second, best of all ways, sizes and tries."""
        best = 0.0
        for size in self._sizes:
            parts = [part[: size // len(self._parts) // 4] for part in self._parts]
            count = sum(part.nbytes for part in parts)
            for way in _ways():
                for _ in range(_TRIES):
                    best = max(best, count / _timed(self._walk, way, parts))
        return best

    def _walk(self, way: Callable[[Array], object], parts: Sequence[Array]) -> None:
        walks = [thread.submit(way, part) for thread, part in zip(self._threads, parts, strict=True)]
        for walk in walks:
            walk.result()


class Copier:
    """Negates a buffer into another on a device.

    Args:
        folder: where the graphs are.
        size: bytes of each buffer.
    """

    def __init__(self, device: Device, folder: Path, size: int) -> None:
        self._size = size
        session = open_session(folder / COPY_FILE, device)
        x, y = (buffer_of(np.ones(size // 4, dtype=np.float32), device) for _ in range(2))
        self._runs = _Queue(session, x, y, _QUEUED_RUNS)

    def bandwidth(self) -> float:
        """Bytes read and written a second, best of several tries."""
        return max(2 * self._size / self._runs.seconds() for _ in range(_TRIES + 1))


class Products:
    """y = x W^T on a device.

    Args:
        folder: where the graphs are.
        shape: of the weight there.
        rows: numbers of rows of x.
    """

    def __init__(
        self, device: Device, threads: int | None, folder: Path, shape: ProductShape, rows: Sequence[int]
    ) -> None:
        self._shape = shape
        session = open_session(folder / PRODUCT_FILE, device, threads)
        self._runs: dict[int, _Queue] = {}
        for count in rows:
            x = buffer_of(np.ones((count, shape.columns), dtype=shape.input_dtype), device)
            y = spare_buffer((count, shape.rows), np.dtype(shape.input_dtype), device)
            self._runs[count] = _Queue(session, x, y, 1 if device.kind == "cpu" else _QUEUED_RUNS)

    def rate(self) -> float:
        """Floating-point operations a second, best of all numbers of rows and several tries."""
        each = 2 * self._shape.rows * self._shape.columns
        return max(each * rows / runs.seconds() for rows, runs in self._runs.items() for _ in range(_TRIES + 1))


class _Queue:
    """Runs of y = f(x) that follow each other on a device, with one wait at the end."""

    def __init__(self, session: onnxruntime.InferenceSession, x: Buffer, y: Buffer, count: int) -> None:
        import onnxruntime

        self._session, self._binding, self._bound = session, session.io_binding(), (x, y)
        x.bind_input(self._binding, "x")
        y.bind_output(self._binding, "y")
        self._unawaited = onnxruntime.RunOptions()
        self._unawaited.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._options = [self._unawaited] * (count - 1) + [onnxruntime.RunOptions()]

    def seconds(self) -> float:
        """Of one of them."""
        return _timed(self._run) / len(self._options)

    def _run(self) -> None:
        for options in self._options:
            self._session.run_with_iobinding(self._binding, options)


def product_graph(shape: ProductShape) -> BuiltGraph:
    """y = x W^T for x `[M, columns]`."""
    builder = WeightedBuilder(shape.shapes, shape.input_dtype, FusedOps())
    specs = (
        (TensorSpec("x", shape.input_dtype, ("m", shape.columns)),),
        (TensorSpec("y", shape.input_dtype, ("m", shape.rows)),),
    )
    builder.g.scope = "product"
    x = graph_value(specs[0][0])
    y = builder.linear(x, "product", ("product",), bias=False)
    return builder.finish("product", [x], [y], specs)


def copy_graph() -> BuiltGraph:
    """y = -x, float32."""
    builder = WeightedBuilder({}, "float32", FusedOps())
    specs = ((TensorSpec("x", "float32", ("n",)),), (TensorSpec("y", "float32", ("n",)),))
    builder.g.scope = "copy"
    x = graph_value(specs[0][0])
    return builder.finish("copy", [x], [builder.g.op("Neg", x)], specs)


def read_sizes(*, quick: bool) -> tuple[int, ...]:
    """Bytes of the buffers to read: several times the last caches, as far as memory allows."""
    least, free = _TIMES_CACHE * last_cache_bytes(), available_memory()
    if free is not None:
        least = min(least, free // _MEMORY_PART)
    return tuple(dict.fromkeys(max(size, least) for size in (QUICK_READ_SIZES if quick else READ_SIZES)))


def last_cache_bytes() -> int:
    """Size of the last caches of all cores that this process may use; 0 where the system does not say.

    Cores that share a cache count once.
    """
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    found: dict[tuple[int, str], int] = {}
    for core in cores:
        for folder in (_CACHES / f"cpu{core}" / "cache").glob("index*"):
            level, shared, size = (_line(folder / name) for name in ("level", "shared_cpu_list", "size"))
            if level.isdecimal() and (match := re.fullmatch(r"(\d+)([KMG])", size)):
                found[int(level), shared] = int(match[1]) << {"K": 10, "M": 20, "G": 30}[match[2]]
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last)


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _filled(length: int) -> Array:
    return np.ones(length, dtype=np.int32)


def _ways() -> list[Callable[[Array], object]]:
    ways: list[Callable[[Array], object]] = [np.max]
    with contextlib.suppress(AttributeError, OSError, TypeError):
        compare = ctypes.CDLL(None).memcmp
        compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

        def compare_halves(part: Array) -> object:
            half = part.nbytes // 2
            return compare(part.ctypes.data, part.ctypes.data + half, half)

        ways.append(compare_halves)
    return ways


def _timed(run: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - began
