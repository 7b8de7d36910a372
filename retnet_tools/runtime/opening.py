"""Opens the graphs of an exported folder: on the device that was asked for, with CUDA graphs where they can be had, and
with one copy of the weights for several; ONNX Runtime would load one for each, and pack it anew at every start.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retnet_tools.errors import InputError, ProviderError, RetNetToolsError
from retnet_tools.graph.checking import check_graph
from retnet_tools.graph.contract import (
    DECODER_FILE,
    MANIFEST_FILE,
    STEP_FILE,
    WEIGHTS_FILE,
    decoder_inputs,
    decoder_outputs,
    step_inputs,
    step_outputs,
)
from retnet_tools.graph.manifest import Manifest
from retnet_tools.machine import allowed_cores
from retnet_tools.runtime.buffers import DeviceBuffer
from retnet_tools.runtime.device_memory import LIBRARY_BYTES, check_device_memory, graph_bytes, tensor_bytes
from retnet_tools.runtime.failures import CaptureError
from retnet_tools.runtime.onnx_session import kernels_are_known, open_session
from retnet_tools.runtime.packed_weights import are_mapped, forget_packed, is_packed, packed_graph
from retnet_tools.runtime.prompts import PREFILL_CHUNK_SIZE
from retnet_tools.runtime.providers import CPU, Device, check_device, cpu_instead

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime


BYTES_OF_A_THREAD = 1 << 27
MOST_COPIED = 1 << 28
"""Bytes of weights that may be packed twice, so that steps have fewer threads than prompts."""
_BORDERS = {STEP_FILE: (step_inputs, step_outputs), DECODER_FILE: (decoder_inputs, decoder_outputs)}


def session_threads(weight_bytes: int, tokens: int) -> int:
    """CPU threads worth starting for a graph that is shown so many tokens at once: 1 to the allowed cores.

    Threads wait for each other after every operation, so each should have 128 MB of weights to multiply by. Steps in
    float32 with 1 and 2 threads, the shortest of 9 turns each on two cores that others used too: shipped model
    (19 MB) 0.29 and 0.66 ms, 35 MB 0.80 and 1.7 ms, 105 MB 7.9 and 13 ms, 286 MB 21 and 26 ms, a 300m model (1.6 GB)
    115 and 131 ms. On two free cores, 0.87 GB a token take 1.5 times as long with one thread (docs/benchmarks.md).
    """
    return max(1, min(allowed_cores(), weight_bytes * tokens // BYTES_OF_A_THREAD))


class EagerStepsWarning(UserWarning):
    """Steps run kernel by kernel on CUDA, though nobody asked for that."""


class GraphOpener:
    """Opens the graphs of one folder.

    Args:
        folder: an exported folder, complete.
        threads: of the CPU provider; None chooses by `session_threads`.
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
        self.eager_reason = device.provider.eager_reason or eager_reason

    def open_step(self, profile: Path | None = None, *, prompts: bool = False) -> onnxruntime.InferenceSession:
        """The graph of steps: captured if that can be, else kernel by kernel, else on the CPU if that is allowed.

        Args:
            prompts: whether `open_prompts` will be called later: on CUDA both graphs share their weights then, and
                there must be room for both.
        """
        try:
            self.device.provider.check_model(self._manifest, self.device)
            if prompts and self.device.provider.memory is not None and not self.device.cpu_fallback:
                self._share((self.device.provider.step_file, DECODER_FILE))
            if self.eager_reason is None:
                try:
                    return self._open_step(cuda_graph=True)
                except CaptureError as error:
                    reason = error.found
                # What is wrong with the graph itself, if anything is, is found here.
                return self.open_eager_step(reason)
            return self._open_step(profile=profile)
        except ProviderError as error:
            if not self.device.cpu_fallback:
                raise
            self.device = cpu_instead(error)
            self.eager_reason = self.device.provider.eager_reason
            return self._open_step(profile=profile)

    def open_eager_step(self, reason: str) -> onnxruntime.InferenceSession:
        """The graph of steps, not captured for this reason, and nowhere but on the device: states may be there."""
        session = self._open_step()
        self.eager_reason = reason
        warnings.warn(f"no CUDA graphs, steps run kernel by kernel: {reason}", EagerStepsWarning, stacklevel=4)
        return session

    def open_prompts(self, step: onnxruntime.InferenceSession) -> onnxruntime.InferenceSession:
        """decoder.onnx for prompts: the session of steps, where that is of it and has the threads for them."""
        threads = self._threads_for(PREFILL_CHUNK_SIZE)
        if self.device.provider.step_file == DECODER_FILE and self._threads_for(1) == threads:
            return step
        return self._open(DECODER_FILE, threads)

    def _open_step(self, *, cuda_graph: bool = False, profile: Path | None = None) -> onnxruntime.InferenceSession:
        return self._open(self.device.provider.step_file, self._threads_for(1), cuda_graph=cuda_graph, profile=profile)

    def _threads_for(self, tokens: int) -> int | None:
        """Of the CPU provider, for so many tokens at once; many packed weights have one session, for all threads."""
        if self._threads or self.device.provider.memory is not None:
            return self._threads
        size = (self._folder / WEIGHTS_FILE).stat().st_size
        shared = not are_mapped(self._manifest) and size > MOST_COPIED
        return session_threads(size, PREFILL_CHUNK_SIZE if shared else tokens)

    def _open(
        self,
        name: str,
        threads: int | None,
        *,
        cuda_graph: bool = False,
        profile: Path | None = None,
    ) -> onnxruntime.InferenceSession:
        """A graph, where there is memory for it.

        Raises:
            ProviderError: the device cannot be had, or has no room; nothing is loaded then.
            InputError: a graph that cannot be read, or another than the manifest says.
        """
        path, kept = self._folder / name, None
        check_graph(path)
        if self.device.provider.memory is not None:
            check_device(self.device)
            needed = 0 if self._shared is not None else graph_bytes(path)
            check_device_memory(self.device, needed + LIBRARY_BYTES, f"{name} of {self._folder}")
        else:
            kept = packed_graph(self._folder, self._manifest, name, threads)
        opened = partial(
            open_session,
            device=self.device,
            threads=threads,
            prepack=is_packed(self._manifest),
            cuda_graph=cuda_graph,
            profile=profile,
            weights=None if self._shared is None else self._shared.of(name),
        )
        if kept is not None:
            try:
                return self._checked(opened(kept, kept=True), name)
            except RetNetToolsError as error:
                reason = error.found
            # Where this one does not open either, the fault is not in what was kept.
            session = self._checked(opened(path), name)
            forget_packed(kept, reason)
            return session
        return self._checked(opened(path), name)

    def _checked(self, session: onnxruntime.InferenceSession, name: str) -> onnxruntime.InferenceSession:
        """The session, whose inputs and outputs are those that the manifest says."""
        for found, specs in zip((session.get_inputs(), session.get_outputs()), _BORDERS[name], strict=True):
            expected = specs(self._manifest.config, self._manifest.state_dtype)
            if [(value.name, tuple(value.shape)) for value in found] != [(spec.name, spec.shape) for spec in expected]:
                path = self._folder / name
                raise InputError(f"{path} does not fit {MANIFEST_FILE}", "the graph it describes", "export again")
        return session

    def _share(self, names: Sequence[str]) -> None:
        """Load the weights of these graphs once for all, where there is room for everything they need.

        A node without a kernel goes to the CPU, and would read weights of the device there before it can be refused. So
        nothing is shared where there is one, or where kernels are not known.
        """
        # onnx_ir, half a second to import, is for graphs on a GPU.
        from retnet_tools.graph.cuda_kernels import cpu_nodes
        from retnet_tools.graph.folder import load_graph

        check_device(self.device)
        paths, known = [self._folder / name for name in names], kernels_are_known()
        weights = sum(map(tensor_bytes, stored_tensors(paths).values())) if known else sum(map(graph_bytes, paths))
        needed = weights + len(names) * LIBRARY_BYTES
        check_device_memory(self.device, needed, f"{' and '.join(names)} of {self._folder}")
        if known and not any(node.reason == "no kernel" for path in paths for node in cpu_nodes(load_graph(path))):
            self._shared = SharedWeights(paths, self.device)


def stored_tensors(paths: Iterable[Path]) -> dict[str, ir.ExternalTensor]:
    """The tensors of weights.data that graphs use, by name; a name is one tensor in all graphs of a folder."""
    import onnx_ir as ir

    from retnet_tools.graph.folder import load_graph

    values = (value for path in paths for value in load_graph(path).initializers.values())
    return {t.name: t for value in values if isinstance(t := value.const_value, ir.ExternalTensor) and t.name}


class SharedWeights:
    """The weights of some graphs, loaded once, a tensor at a time. Sessions that use them must not outlive this."""

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
    import onnx.parser
    import onnxruntime

    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> empty (float[1] x) => (float[1] y) { y = Identity (x) }'
    )
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=[CPU.onnxruntime])
