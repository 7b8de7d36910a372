"""Tensors that graphs read and write in place, and graphs bound to them: arrays on the CPU, CUDA's memory on a GPU.

ONNX Runtime's own values on a GPU come from an arena of the process that grows by powers of two and gives nothing back.
So memory comes from cudaMalloc here, goes back with its buffer, and graphs are bound to its address.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from retnet_tools.graph.contract import TensorSpec
from retnet_tools.runtime.cuda import cuda_runtime
from retnet_tools.runtime.device_memory import enough_memory
from retnet_tools.runtime.failures import CaptureError, one_line
from retnet_tools.runtime.providers import Device
from retnet_tools.weights import Array

if TYPE_CHECKING:
    import onnxruntime


EAGER = -1
"""The `gpu_graph_id` that ONNX Runtime neither captures nor replays."""


class Buffer(ABC):
    """A tensor at an address that does not change. Whoever binds a graph to it keeps it alive."""

    shape: tuple[int, ...]
    dtype: Any
    address: int
    _on: tuple[str, int]

    @property
    def size_bytes(self) -> int:
        """Of all elements."""
        return math.prod(self.shape) * int(self.dtype.itemsize)

    def bind_input(self, binding: onnxruntime.IOBinding, name: str) -> None:
        """Let a graph read it."""
        binding.bind_input(name, *self._place)

    def bind_output(self, binding: onnxruntime.IOBinding, name: str) -> None:
        """Let a graph write it."""
        binding.bind_output(name, *self._place)

    @classmethod
    def of(cls, array: Array, device: Device) -> Buffer:
        """A buffer with this content."""
        buffer = cls.empty(np.shape(array), np.asarray(array).dtype, device)
        buffer.write(array)
        return buffer

    @classmethod
    @abstractmethod
    def empty(cls, shape: Sequence[int], dtype: Any, device: Device) -> Buffer:
        """A buffer whose content does not matter."""

    @abstractmethod
    def clear(self) -> None:
        """Set every element to 0."""

    @abstractmethod
    def read(self) -> Array:
        """A copy of the content, in an array of its own."""

    @abstractmethod
    def write(self, array: Array) -> None:
        """Replace the content."""

    @abstractmethod
    def rows(self, index: Sequence[int]) -> Buffer:
        """A new buffer of these rows, in this order; a row may come several times."""

    @property
    def _place(self) -> tuple[str, int, int, list[int], int]:
        return (*self._on, onnx.helper.np_dtype_to_tensor_dtype(self.dtype), list(self.shape), self.address)


class HostBuffer(Buffer):
    """An array in the CPU's memory; it is the content, so it must be the caller's own."""

    _on = ("cpu", 0)

    def __init__(self, array: Array) -> None:
        self._array = np.ascontiguousarray(array).reshape(np.shape(array))
        self.shape, self.dtype, self.address = self._array.shape, self._array.dtype, self._array.ctypes.data

    @classmethod
    def of(cls, array: Array, device: Device) -> HostBuffer:
        """The array itself."""
        return cls(array)

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: Any, device: Device) -> HostBuffer:
        """A new array."""
        return cls(np.empty(shape, dtype=dtype))

    def clear(self) -> None:
        """In place."""
        self._array[...] = 0

    def read(self) -> Array:
        """One copy."""
        return self._array.copy()

    def write(self, array: Array) -> None:
        """In place."""
        # numpy would repeat what is smaller.
        assert np.shape(array) == self.shape
        np.copyto(self._array, array)

    def rows(self, index: Sequence[int]) -> HostBuffer:
        """Copied along the first axis."""
        return HostBuffer(self._array[np.asarray(index, dtype=np.int64)])


class DeviceBuffer(Buffer):
    """Memory of a GPU, its content undefined at first. It is given back when nothing refers to the buffer any more."""

    def __init__(self, shape: Sequence[int], dtype: Any, device: Device) -> None:
        self.shape, self.dtype, self._device = tuple(shape), np.dtype(dtype), device
        self._on = (device.kind, device.index)
        self._runtime = cuda_runtime(device.index)
        with enough_memory(device, f"a buffer of {list(shape)} {self.dtype}", self.size_bytes):
            self.address = self._runtime.allocate(self.size_bytes)
        weakref.finalize(self, self._runtime.release, self.address).atexit = False

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: Any, device: Device) -> DeviceBuffer:
        """New memory."""
        return cls(shape, dtype, device)

    def read(self) -> Array:
        """One copy, into an array that is the caller's."""
        array = np.empty(self.shape, dtype=self.dtype)
        self._runtime.download(array, self.address)
        return array

    def write(self, array: Array) -> None:
        """From the CPU."""
        array = np.ascontiguousarray(array, dtype=self.dtype)
        assert array.size == math.prod(self.shape)
        self._runtime.upload(self.address, array)

    def clear(self) -> None:
        """Set every element to 0."""
        self._runtime.clear(self.address, self.size_bytes)

    def copy(self, source: Buffer) -> None:
        """Take the content of a buffer of the same shape on this GPU."""
        self._runtime.copy_rows(self.address, source.address, self.size_bytes, (0,))

    def rows(self, index: Sequence[int]) -> DeviceBuffer:
        """Copied along the first axis, on the device."""
        chosen = DeviceBuffer((len(index), *self.shape[1:]), self.dtype, self._device)
        self._runtime.copy_rows(chosen.address, self.address, self.size_bytes // self.shape[0], index)
        return chosen


def buffer_of(array: Array, device: Device) -> Buffer:
    """A buffer with the content of an array; on the CPU the array itself, so it must be the caller's own."""
    return _type_on(device).of(array, device)


def zero_buffer(shape: Sequence[int], dtype: Any, device: Device) -> Buffer:
    """A buffer of zeros."""
    buffer = spare_buffer(shape, dtype, device)
    buffer.clear()
    return buffer


def spare_buffer(shape: Sequence[int], dtype: Any, device: Device) -> Buffer:
    """A buffer whose content does not matter; as for every buffer, an `OutOfMemoryError` where there is no room."""
    return _type_on(device).empty(shape, dtype, device)


def _type_on(device: Device) -> type[Buffer]:
    return HostBuffer if device.provider.memory is None else DeviceBuffer


class Binding:
    """A graph with everything bound once: tokens and logits in buffers of its own, states where they lie.

    Args:
        session: the graph.
        feeds: the inputs but for the states, of the shapes that every run will have; the first is `[B, ...]`.
        past, present: the states to read and to write by name, the same buffers where the graph works in place.
        output: the first output, `[B, R, ...]`.
        rows: R, logits of each sequence, where the graph leaves it open.
        device: of the session.
        graph_id: of the CUDA graph that runs of these buffers are; None runs kernel by kernel. No two bindings of a
            session may share one: a replay reads and writes what its capture did.
        needed: bytes that a run allocates, as far as is known.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        feeds: Mapping[str, Array],
        past: Mapping[str, Buffer],
        present: Mapping[str, Buffer],
        output: TensorSpec,
        device: Device,
        graph_id: int | None = None,
        needed: int | None = None,
        rows: int = 1,
    ) -> None:
        import onnxruntime

        self._session, self._device, self._needed, self._captured = session, device, needed, graph_id is not None
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(EAGER if graph_id is None else graph_id))
        self._binding = session.io_binding()
        # Scalars are sizes, which kernels read on the CPU.
        self._feeds = {
            name: buffer_of(np.array(array), device) if np.ndim(array) else HostBuffer(np.array(array))
            for name, array in feeds.items()
        }
        first = next(iter(feeds.values()))
        self._what = f"a run of {' x '.join(map(str, np.shape(first)[:2]))} tokens"
        width = [rows if isinstance(size, str) else size for size in output.shape[1:]]
        self._output = zero_buffer((len(first), *width), output.dtype, device)
        # Graphs know addresses only.
        self._states = (*past.values(), *present.values())
        for name, buffer in (*self._feeds.items(), *past.items()):
            buffer.bind_input(self._binding, name)
        for name, buffer in ((output.name, self._output), *present.items()):
            buffer.bind_output(self._binding, name)

    def run(self, feeds: Mapping[str, Array], *, fetch: bool) -> Array | None:
        """Run once; a copy of the first output `[B, R, ...]`, where it is asked for.

        Raises:
            OutOfMemoryError: no memory on the device.
            CaptureError: whatever a run that is captured or replayed fails of.
        """
        for name, array in feeds.items():
            self._feeds[name].write(np.asarray(array))
        try:
            with enough_memory(self._device, self._what, self._needed):
                self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            if self._captured:
                raise CaptureError(one_line(error)) from error
            raise
        return self._output.read() if fetch else None
