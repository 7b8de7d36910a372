"""Opens the graphs of an exported folder: on the device that was asked for, with CUDA graphs where they can be had."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from retnet_tools.errors import InputError, ProviderError
from retnet_tools.graph.contract import MANIFEST_FILE, STEP_FILE, TensorSpec
from retnet_tools.graph.cuda_kernels import cpu_nodes
from retnet_tools.graph.manifest import Manifest
from retnet_tools.graph.reader import load_graph
from retnet_tools.runtime.device_memory import LIBRARY_BYTES, check_memory, graph_bytes, tensor_bytes
from retnet_tools.runtime.providers import Device, check_device, check_retention, cpu_instead, open_session
from retnet_tools.runtime.shared_weights import SharedWeights, stored_tensors

if TYPE_CHECKING:
    import onnxruntime


class EagerStepsWarning(UserWarning):
    """Steps run kernel by kernel on CUDA, though nobody asked for that."""


class GraphOpener:
    """Opens the graphs of one folder.

    Args:
        folder: an exported folder, complete.
        threads: of the CPU provider.
        eager_reason: why steps are not to be captured; None captures them where that is possible.

    Attributes:
        device: where graphs run; the CPU once `cpu_fallback` was the only way.
        eager_reason: why steps run kernel by kernel; None where they are replayed as CUDA graphs.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, device: Device, threads: int | None, eager_reason: str | None
    ) -> None:
        self._folder, self._manifest, self._threads = folder, manifest, threads
        self._shared: SharedWeights | None = None
        self.device = device
        self.eager_reason = "it runs on the CPU" if device.kind == "cpu" else eager_reason

    def open_step(
        self, inputs: Sequence[TensorSpec], profile: Path | None = None, *, beside: Sequence[str] = ()
    ) -> onnxruntime.InferenceSession:
        """step.onnx: captured if that can be, else kernel by kernel, else on the CPU if that is allowed.

        Args:
            beside: graphs that will be opened later: on CUDA they share their weights with this one, and there must be
                room for all.

        Raises:
            ProviderError, InputError: as `open`.
        """
        try:
            check_retention(self._manifest, self.device)
            if beside and self.device.kind == "cuda" and not self.device.cpu_fallback:
                self._share((STEP_FILE, *beside))
            if self.eager_reason is None:
                try:
                    return self.open(STEP_FILE, inputs, cuda_graph=True)
                except ProviderError as error:
                    if "graph capture" not in str(error):
                        raise
                    self._capture_no_more(error.found)
            return self.open(STEP_FILE, inputs, profile=profile)
        except ProviderError as error:
            if not self.device.cpu_fallback:
                raise
            self.device, self.eager_reason = cpu_instead(error), "it runs on the CPU"
            return self.open(STEP_FILE, inputs, profile=profile)

    def open_eager_step(self, inputs: Sequence[TensorSpec], reason: str) -> onnxruntime.InferenceSession:
        """step.onnx kernel by kernel from now on, and nowhere else: there are states on the device.

        Args:
            reason: why it is not captured any more.

        Raises:
            ProviderError, InputError: as `open`.
        """
        self._capture_no_more(reason)
        return self.open(STEP_FILE, inputs)

    def open(
        self,
        name: str,
        inputs: Sequence[TensorSpec],
        *,
        prepack: bool = True,
        cuda_graph: bool = False,
        profile: Path | None = None,
    ) -> onnxruntime.InferenceSession:
        """A graph whose inputs are these, where there is memory for it.

        Raises:
            ProviderError: the device cannot be had, or has no room; nothing is loaded then.
            InputError: a graph that cannot be read, or another than the manifest says.
        """
        path = self._folder / name
        if self.device.kind == "cuda":
            check_device(self.device)
            needed = 0 if self._shared is not None else graph_bytes(path)
            check_memory(self.device, needed + LIBRARY_BYTES, f"{name} of {self._folder}")
        session = open_session(
            path,
            self.device,
            self._threads,
            prepack=prepack,
            cuda_graph=cuda_graph,
            profile=profile,
            weights=None if self._shared is None else self._shared.of(name),
        )
        found = [(value.name, tuple(value.shape)) for value in session.get_inputs()]
        if found != [(spec.name, spec.shape) for spec in inputs]:
            raise InputError(f"{path} does not fit {MANIFEST_FILE}", "the graph it describes", "export again")
        return session

    def _share(self, names: Sequence[str]) -> None:
        """Load the weights of these graphs once for all, where there is room for everything they need."""
        check_device(self.device)
        paths = [self._folder / name for name in names]
        weights = sum(map(tensor_bytes, stored_tensors(paths).values()))
        needed = weights + len(names) * LIBRARY_BYTES
        check_memory(self.device, needed, f"{' and '.join(names)} of {self._folder}")
        # A node without a kernel goes to the CPU, and would read weights there before it can be refused.
        if not any(node.reason == "no kernel" for path in paths for node in cpu_nodes(load_graph(path))):
            self._shared = SharedWeights(paths, self.device)

    def _capture_no_more(self, reason: str) -> None:
        self.eager_reason = reason
        warnings.warn(f"no CUDA graphs, steps run kernel by kernel: {reason}", EagerStepsWarning, stacklevel=4)
