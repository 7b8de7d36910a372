"""One copy of the weights on a GPU for several graphs of a folder; ONNX Runtime would load one for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from retnet_tools.graph.reader import load_graph
from retnet_tools.runtime.buffers import DeviceBuffer
from retnet_tools.runtime.device_memory import tensor_bytes

if TYPE_CHECKING:
    import onnxruntime

    from retnet_tools.runtime.providers import Device


def stored_tensors(paths: Iterable[Path]) -> dict[str, ir.ExternalTensor]:
    """The tensors of weights.data that graphs use, by name; a name is one tensor in all graphs of a folder."""
    values = (value for path in paths for value in load_graph(path).initializers.values())
    return {t.name: t for value in values if isinstance(t := value.const_value, ir.ExternalTensor) and t.name}


class SharedWeights:
    """The weights of some graphs, loaded once. Sessions that use them must not outlive this.

    Memory besides: one tensor at a time.

    Args:
        paths: the graphs.

    Raises:
        ProviderError: no memory on the device.
    """

    def __init__(self, paths: Sequence[Path], device: Device) -> None:
        self._names = {path.name: frozenset(stored_tensors((path,))) for path in paths}
        # Kept here, since values of ONNX Runtime know addresses only.
        self._buffers: list[DeviceBuffer] = []
        self._values: dict[str, onnxruntime.OrtValue] = {}
        binding = _empty_session().io_binding()
        for name, tensor in stored_tensors(paths).items():
            buffer = DeviceBuffer((tensor_bytes(tensor),), np.uint8, device)
            buffer.write(np.frombuffer(tensor.tobytes(), dtype=np.uint8))
            self._buffers.append(buffer)
            # How a value of memory that is not ONNX Runtime's own is made: nothing is run.
            place = (device.kind, device.index, tensor.dtype.value, tensor.shape.numpy(), buffer.address)
            binding.clear_binding_outputs()
            binding.bind_output("y", *place)
            (self._values[name],) = binding.get_outputs()

    def of(self, graph: str) -> Mapping[str, onnxruntime.OrtValue]:
        """The weights of one of the graphs, by the name of its file."""
        return {name: value for name, value in self._values.items() if name in self._names[graph]}


def _empty_session() -> onnxruntime.InferenceSession:
    import onnxruntime

    x = ir.Value(name="x", shape=ir.Shape((1,)), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Identity", [x])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "y", x.shape, x.type
    graph = ir.Graph([x], list(node.outputs), nodes=[node], opset_imports={"": 17}, name="empty")
    model = ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString()
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
