"""One graph opened in ONNX Runtime, on the device that was asked for and on no other."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from retnet_tools.console import LOG
from retnet_tools.errors import InputError, ProviderError
from retnet_tools.graph.checking import check_graph
from retnet_tools.graph.contract import FIRST_ONNXRUNTIME, STEP_FILE
from retnet_tools.runtime.device_memory import SMALLER
from retnet_tools.runtime.failures import CaptureError, NoKernelError, OutOfMemoryError, failure_type, one_line
from retnet_tools.runtime.providers import CpuFallbackWarning, Device, check_device

if TYPE_CHECKING:
    import onnxruntime

RECORD_PLACEMENT = ("session.record_ep_graph_assignment_info", "1")
"""The session option without which ONNX Runtime forgets where it placed what."""

_KEPT_WEIGHTS = "session.optimized_model_external_initializers_file_name"
_FOLDER = "session.model_external_initializers_file_folder_path"


class UnforeseenPlacementWarning(UserWarning):
    """Nodes run on the CPU that the table of kernels, which is of another onnxruntime, has on the device."""


@dataclass(frozen=True)
class Placement:
    """The nodes of each provider: name to operator, subgraphs included.

    ONNX Runtime notes them when it has shared them out, before it merges nodes of one provider; nodes that it folded
    into constants by then are gone.
    """

    nodes: Mapping[str, Mapping[str, str]]

    @property
    def counts(self) -> dict[str, int]:
        """Nodes of each provider that has any, by its name without `ExecutionProvider`."""
        return {name.removesuffix("ExecutionProvider"): len(nodes) for name, nodes in self.nodes.items() if nodes}

    def outside(self, device: Device) -> dict[str, str]:
        """The nodes that another provider than the device's own runs."""
        own = device.provider.onnxruntime
        return {name: kind for other, nodes in self.nodes.items() if other != own for name, kind in nodes.items()}


def node_placement(session: onnxruntime.InferenceSession) -> Placement:
    """The placement of a session that was opened with `RECORD_PLACEMENT`."""
    nodes: dict[str, dict[str, str]] = {}
    for part in session.get_provider_graph_assignment_info():
        own = nodes.setdefault(part.ep_name, {})
        for node in part.get_nodes():
            own[node.name or f"unnamed {len(own)}"] = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return Placement(nodes)


def open_session(
    path: Path,
    device: Device,
    threads: int | None = None,
    *,
    prepack: bool = True,
    cuda_graph: bool = False,
    profile: Path | None = None,
    weights: Mapping[str, onnxruntime.OrtValue] | None = None,
    exact: bool = False,
    keep: Path | None = None,
    kept: bool = False,
) -> onnxruntime.InferenceSession:
    """Open a graph.

    float32 is float32: products do not use TF32. Device memory grows by what is asked for, not by powers of two.

    Args:
        path: the graph; its external data lies beside it.
        device: where to run. step.onnx runs there whole; of other graphs only what computes shapes may run on the CPU.
        threads: of the CPU provider; None lets ONNX Runtime choose.
        prepack: whether the CPU provider may keep rearranged copies of the weights; without, it maps their file.
        cuda_graph: whether the graph is captured on the first run of each `gpu_graph_id`, and replayed then.
        profile: the start of the name of a profile that ONNX Runtime writes when the session's profiling ends.
        weights: values to use for tensors of the external data, by name, in place of loading them.
        exact: whether products with quantized weights are made in floats, whatever accuracy level the graph asks for.
        keep: where to write the graph as it is optimized, with its weights packed as this processor wants them.
        kept: whether that is what `path` is.

    Raises:
        ProviderError: the provider cannot be had, or has no place for a node; says what is missing.
        OutOfMemoryError, NoKernelError: the device has no memory or no kernel for the graph.
        CaptureError: the graph cannot be opened for capturing, for another reason than these.
        InputError: the graph cannot be read.
    """
    import onnxruntime

    # What goes wrong is an error of ours; its own lines would come beside it.
    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    provider = device.provider
    unpacked = () if prepack else (("session.disable_prepacking", "1"),)
    in_floats = (("session.qdq_matmulnbits_accuracy_level", "0"), (_FOLDER, str(path.parent))) if exact else ()
    written = (
        ()
        if keep is None
        else ((_KEPT_WEIGHTS, f"{keep.stem}.data"), ("session.save_external_prepacked_constant_initializers", "1"))
    )
    for entry in (RECORD_PLACEMENT, *provider.settings, *unpacked, *in_floats, *written):
        options.add_session_config_entry(*entry)
    if keep is not None:
        options.optimized_model_filepath = str(keep)
    if kept:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Where buffers are used again is found in a time that grows with the square of the nodes (0.2 s of 1.3b's steps);
    # on the CPU an arena does as well without.
    options.enable_mem_reuse = provider.memory is not None
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    for name, value in (weights or {}).items():
        options.add_initializer(name, value)
    check_device(device)
    try:
        # ONNX Runtime's own fallback opens the graph on the CPU and says so on stdout.
        session = onnxruntime.InferenceSession(
            _in_floats(path) if exact else str(path),
            options,
            providers=[(provider.onnxruntime, provider.options(device, cuda_graph))],
            enable_fallback=0,
        )
    except Exception as error:
        raise _cannot_open(path, device, error, cuda_graph=cuda_graph) from error
    if session.get_providers()[0] != provider.onnxruntime:
        raise ProviderError(
            f"{provider.onnxruntime} did not start; ONNX Runtime offers {', '.join(session.get_providers())}",
            provider.onnxruntime,
            "check the driver and the CUDA libraries with `retnet-tools doctor`, or use --device cpu",
        )
    _check_placement(path, device, node_placement(session))
    LOG.debug("opened %s on %s", path, device)
    return session


def kernels_are_known() -> bool:
    """Whether the table of kernels is of the onnxruntime that is in use."""
    import onnxruntime

    from retnet_tools.graph.cuda_kernels import kernel_version

    return str(onnxruntime.__version__) == kernel_version()


def misplaced(path: Path, device: Device, placement: Placement) -> tuple[Counter[str], Counter[str]]:
    """Operators of a graph on a GPU that run on the CPU and may not, with their numbers.

    Returns:
        Those to refuse, and those that the table of kernels, of another onnxruntime, has on the GPU.
    """
    outside = placement.outside(device)
    if not outside:
        return Counter(), Counter()
    # onnx_ir, half a second to import, is for graphs on a GPU.
    from retnet_tools.graph.cuda_kernels import cpu_nodes
    from retnet_tools.graph.folder import load_graph

    reasons = {node.name: node.reason for node in cpu_nodes(load_graph(path))}
    if path.name != STEP_FILE:
        outside = {name: kind for name, kind in outside.items() if reasons.get(name) != "shapes"}
    refused = {name: kind for name, kind in outside.items() if name in reasons or kernels_are_known()}
    return Counter(refused.values()), Counter(kind for name, kind in outside.items() if name not in refused)


def _in_floats(path: Path) -> bytes:
    """A graph in which no product is made in int8, as bytes."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 0
    return bytes(model.SerializeToString())


def _check_placement(path: Path, device: Device, placement: Placement) -> None:
    refused, unforeseen = misplaced(path, device, placement)
    if unforeseen:
        import onnxruntime

        from retnet_tools.graph.cuda_kernels import kernel_version

        warnings.warn(
            f"{unforeseen.total()} nodes of {path.name} run on the CPU beside {device}: {_counted(unforeseen)}; "
            f"known here are the kernels of onnxruntime {kernel_version()}, not of {onnxruntime.__version__}",
            UnforeseenPlacementWarning,
            stacklevel=3,
        )
    if not refused:
        return
    found = f"{refused.total()} nodes of {path.name} have no place on {device}: {_counted(refused)}"
    if not device.cpu_fallback:
        raise ProviderError(found, "every node on the device", "export with --device cuda, or add --allow-cpu-fallback")
    warnings.warn(f"{found}; they run on the CPU, as --allow-cpu-fallback says", CpuFallbackWarning, stacklevel=3)


def _counted(operators: Counter[str]) -> str:
    return ", ".join(f"{operator} ({count})" for operator, count in sorted(operators.items()))


def _cannot_open(path: Path, device: Device, error: Exception, *, cuda_graph: bool) -> Exception:
    """The error for a graph that ONNX Runtime does not open."""
    if (needed := _newer_onnxruntime(path)) is not None:
        return needed
    reason, kind = one_line(error), failure_type(error)
    if kind is NoKernelError:
        found, action = f"{path.name} cannot run on {device} ({reason})", device.provider.without_kernel
        return NoKernelError(found, "a graph whose types the provider has kernels for", action)
    if device.provider.memory is None:
        return InputError(f"{path} cannot be opened ({reason})", "a complete export", "export the checkpoint again")
    if kind is OutOfMemoryError:
        return OutOfMemoryError(f"{path.name} does not fit into the memory of {device} ({reason})", "", SMALLER)
    return (CaptureError if cuda_graph else ProviderError)(f"{path} cannot be opened on {device} ({reason})")


def _newer_onnxruntime(path: Path) -> ProviderError | None:
    """The error for a graph of an opset that this onnxruntime is too old for."""
    import onnxruntime

    try:
        opset = max((row.version for row in check_graph(path).opset_import if not row.domain), default=0)
    except InputError:
        return None  # Whatever is wrong with it, ONNX Runtime has said it.
    needed, used = FIRST_ONNXRUNTIME.get(opset), str(onnxruntime.__version__)
    if needed is None or _release(used) >= _release(needed):
        return None
    return ProviderError(
        f"{path} is of ai.onnx opset {opset}, which onnxruntime {used} does not run",
        f"onnxruntime {needed} or later",
        f"pip install 'onnxruntime>={needed}' in place of what is installed, or export without --opset {opset}",
    )


def _release(version: str) -> tuple[int, ...]:
    """`1.32` of 1.32.0 and of 1.32.0.dev1, as numbers."""
    return tuple(int(part) for part in version.split(".")[:2])
