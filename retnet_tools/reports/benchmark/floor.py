"""What the device can do at best: bytes it reads and products it computes in a second, measured beside the model.

Reading is measured over buffers several times as large as the last cache. On the CPU each thread walks its own part of
the buffer in two ways, and the best of all sizes, ways and tries counts:

    maximum   numpy's maximum of int32, one stream of reads and no writes
    compare   memcmp of the two halves, two streams of reads and no writes

On a GPU an ONNX graph negates a buffer, and bytes read and written count.

Products are measured with a single Gemm in ONNX Runtime, in the types of the model (quantized: MatMulNBits), over
several numbers of rows.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from retnet_tools.graph.probes import COPY_FILE, PRODUCT_FILE, ProductShape
from retnet_tools.machine import this_machine
from retnet_tools.runtime.providers import Device, open_session
from retnet_tools.runtime.state import device_value
from retnet_tools.weights import Array

READ_SIZES = (1 << 27, 1 << 28, 1 << 29)
QUICK_READ_SIZES = (1 << 26,)
DEVICE_READ_SIZES = (1 << 28, 1 << 30)
_TIMES_CACHE = 4
_TRIES = 3
ROWS = (128, 256, 512)
QUICK_ROWS = (128,)


def read_bandwidth(device: Device, threads: int | None, folder: Path, *, quick: bool) -> float:
    """Bytes a second that the device reads (a GPU: reads and writes), best of several ways, sizes and tries.

    Args:
        threads: that read at once on the CPU; None takes one for each core.
        folder: where the graphs of `retnet_tools.graph.probes` are.
    """
    if device.kind != "cpu":
        return _copy_bandwidth(device, folder, QUICK_READ_SIZES if quick else DEVICE_READ_SIZES)
    sizes = QUICK_READ_SIZES if quick else tuple(max(size, _TIMES_CACHE * last_cache_bytes()) for size in READ_SIZES)
    count = threads or this_machine().cores
    buffer = np.ones(max(sizes) // 4, dtype=np.int32)
    best = 0.0
    with ThreadPoolExecutor(count) as pool:
        for size in dict.fromkeys(sizes):
            parts = np.array_split(buffer[: size // 4], count)
            for way in _ways():
                for _ in range(_TRIES):
                    seconds = _timed(_walk, pool, way, parts)
                    best = max(best, size / seconds)
    return best


def product_rate(device: Device, threads: int | None, folder: Path, shape: ProductShape, *, quick: bool) -> float:
    """Floating-point operations a second in one Gemm, best of several numbers of rows and tries.

    Args:
        folder: where the graphs of `retnet_tools.graph.probes` are.
        shape: of the weight there.
    """
    session = open_session(folder / PRODUCT_FILE, device, threads)
    best = 0.0
    for rows in QUICK_ROWS if quick else ROWS:
        x = device_value(np.ones((rows, shape.columns), dtype=shape.input_dtype), device)
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", x)
        binding.bind_output("y", device.kind, device.index)
        for _ in range(_TRIES + 1):
            seconds = _timed(session.run_with_iobinding, binding)
            best = max(best, 2 * rows * shape.rows * shape.columns / seconds)
    return best


def last_cache_bytes() -> int:
    """Size of the largest cache of the first core; 0 where the system does not say."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError):
            if found := re.fullmatch(r"(\d+)([KMG])", file.read_text(encoding="ascii").strip()):
                sizes.append(int(found[1]) << {"K": 10, "M": 20, "G": 30}[found[2]])
    return max(sizes)


def _copy_bandwidth(device: Device, folder: Path, sizes: Sequence[int]) -> float:
    session = open_session(folder / COPY_FILE, device)
    best = 0.0
    for size in sizes:
        values = [device_value(np.ones(size // 4, dtype=np.float32), device) for _ in range(2)]
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", values[0])
        binding.bind_ortvalue_output("y", values[1])
        for _ in range(_TRIES + 1):
            best = max(best, 2 * size / _timed(session.run_with_iobinding, binding))
    return best


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


def _walk(pool: ThreadPoolExecutor, way: Callable[[Array], object], parts: Sequence[Array]) -> None:
    for _ in pool.map(way, parts):
        pass


def _timed(run: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - began
