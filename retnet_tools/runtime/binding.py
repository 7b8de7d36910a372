"""A graph bound to buffers: what is fed, what is fetched, and states that stay where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from retnet_tools.graph.contract import TensorSpec
from retnet_tools.runtime.buffers import Buffer, buffer_of, zero_buffer
from retnet_tools.runtime.device_memory import enough_memory
from retnet_tools.runtime.providers import Device
from retnet_tools.weights import Array

if TYPE_CHECKING:
    import onnxruntime

EAGER = -1
"""The `gpu_graph_id` that ONNX Runtime neither captures nor replays."""


class Binding:
    """A graph with everything bound once: tokens and logits in buffers of its own, states where they lie.

    Args:
        session: the graph.
        feeds: the inputs but for the states, of the shapes that every run will have; the first is `[B, ...]`.
        past, present: the states to read and to write by name, the same buffers where the graph works in place.
        output: the first output, `[B, 1, ...]`.
        device: of the session.
        graph_id: of the CUDA graph that runs of these buffers are; None runs kernel by kernel. No two bindings of a
            session may share one: a replay reads and writes what its capture did.
        needed: bytes that a run allocates, as far as is known.

    Raises:
        ProviderError: no memory on the device.
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
    ) -> None:
        import onnxruntime

        self._session, self._device, self._needed = session, device, needed
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(EAGER if graph_id is None else graph_id))
        self._binding = session.io_binding()
        # Scalars are sizes, which kernels read on the CPU.
        places = {name: device if np.ndim(array) else Device("cpu") for name, array in feeds.items()}
        self._feeds = {name: buffer_of(np.array(array), places[name]) for name, array in feeds.items()}
        first = next(iter(feeds.values()))
        self._what = f"a run of {' x '.join(map(str, np.shape(first)[:2]))} tokens"
        self._output = zero_buffer((len(first), *map(int, output.shape[1:])), output.dtype, device)
        # Graphs know addresses only.
        self._states = (*past.values(), *present.values())
        for name, buffer in (*self._feeds.items(), *past.items()):
            buffer.bind_input(self._binding, name)
        for name, buffer in ((output.name, self._output), *present.items()):
            buffer.bind_output(self._binding, name)

    def run(self, feeds: Mapping[str, Array], *, fetch: bool) -> Array | None:
        """Run once; a copy of the first output `[B, ...]`, its second axis left out, where it is asked for.

        Raises:
            ProviderError: no memory on the device.
        """
        for name, array in feeds.items():
            self._feeds[name].write(np.asarray(array))
        with enough_memory(self._device, self._what, self._needed):
            self._session.run_with_iobinding(self._binding, self._options)
        return self._output.read()[:, 0] if fetch else None
