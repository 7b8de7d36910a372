"""Opens the graphs of an exported folder: on the device that was asked for, with CUDA graphs where they can be had."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from retnet_tools.errors import InputError, ProviderError
from retnet_tools.graph.contract import MANIFEST_FILE, STEP_FILE, TensorSpec
from retnet_tools.graph.manifest import Manifest
from retnet_tools.runtime.device_memory import LIBRARY_BYTES, check_memory, graph_bytes
from retnet_tools.runtime.providers import Device, check_device, check_retention, cpu_instead, open_session

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
        self.device = device
        self.eager_reason = "it runs on the CPU" if device.kind == "cpu" else eager_reason

    def open_step(
        self, inputs: Sequence[TensorSpec], profile: Path | None = None, *, beside: Sequence[str] = ()
    ) -> onnxruntime.InferenceSession:
        """step.onnx: captured if that can be, else kernel by kernel, else on the CPU if that is allowed.

        Args:
            beside: graphs that will be opened later, and need room as well.

        Raises:
            ProviderError, InputError: as `open`.
        """
        try:
            check_retention(self._manifest, self.device)
            if beside:
                self._check_room((STEP_FILE, *beside))
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
        self._check_room((name,))
        session = open_session(
            path, self.device, self._threads, prepack=prepack, cuda_graph=cuda_graph, profile=profile
        )
        found = [(value.name, tuple(value.shape)) for value in session.get_inputs()]
        if found != [(spec.name, spec.shape) for spec in inputs]:
            raise InputError(f"{path} does not fit {MANIFEST_FILE}", "the graph it describes", "export again")
        return session

    def _check_room(self, names: Sequence[str]) -> None:
        """Check that there is a device, and room for these graphs at once."""
        if self.device.kind == "cuda":
            check_device(self.device)
            needed = sum(graph_bytes(self._folder / name) + LIBRARY_BYTES for name in names)
            check_memory(self.device, needed, f"{' and '.join(names)} of {self._folder}")

    def _capture_no_more(self, reason: str) -> None:
        self.eager_reason = reason
        warnings.warn(f"no CUDA graphs, steps run kernel by kernel: {reason}", EagerStepsWarning, stacklevel=4)
