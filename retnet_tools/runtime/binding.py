"""A graph bound to buffers: what is fed, what is fetched, and states that stay where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from retnet_tools.graph.contract import TensorSpec
from retnet_tools.runtime.providers import Device
from retnet_tools.runtime.state import device_value
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
        output: the first output.
        device: of the session.
        graph_id: of the CUDA graph that runs of these buffers are; None runs kernel by kernel. No two bindings of a
            session may share one: a replay reads and writes what its capture did.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        feeds: Mapping[str, Array],
        past: Mapping[str, onnxruntime.OrtValue],
        present: Mapping[str, onnxruntime.OrtValue],
        output: TensorSpec,
        device: Device,
        graph_id: int | None = None,
    ) -> None:
        import onnxruntime

        self._session = session
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(EAGER if graph_id is None else graph_id))
        self._binding = session.io_binding()
        # Scalars are sizes, which kernels read on the CPU.
        places = {name: device if np.ndim(array) else Device("cpu") for name, array in feeds.items()}
        self._feeds = {name: device_value(np.array(array), places[name]) for name, array in feeds.items()}
        batch = len(next(iter(feeds.values())))
        shape = (batch, *map(int, output.shape[1:]))
        self._logits = device_value(np.zeros(shape, dtype=output.dtype), device)
        for name, value in (*self._feeds.items(), *past.items()):
            self._binding.bind_ortvalue_input(name, value)
        for name, value in ((output.name, self._logits), *present.items()):
            self._binding.bind_ortvalue_output(name, value)

    def run(self, feeds: Mapping[str, Array], *, fetch: bool) -> Array | None:
        """Run once; a copy of the first output `[B, ...]` where it is asked for."""
        for name, array in feeds.items():
            self._feeds[name].update_inplace(np.asarray(array, order="C"))
        self._session.run_with_iobinding(self._binding, self._options)
        return np.array(self._logits.numpy()[:, 0]) if fetch else None
