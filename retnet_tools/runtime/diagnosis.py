"""What this machine offers: packages, CUDA's libraries, devices and their memory, and where graphs would run."""

from __future__ import annotations

import platform
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from retnet_tools.errors import ProviderError, RetNetToolsError
from retnet_tools.graph.contract import PREFILL_FILE, STEP_FILE
from retnet_tools.graph.cuda_kernels import cpu_nodes
from retnet_tools.graph.folder import load_graph
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.runtime import cuda, installation
from retnet_tools.runtime.device_memory import LIBRARY_BYTES, graph_bytes, state_bytes
from retnet_tools.runtime.onnx_session import misplaced, node_placement, open_session
from retnet_tools.runtime.packed_weights import cache_folder, kept_bytes
from retnet_tools.runtime.providers import CPU, CUDA, Device, check_device
from retnet_tools.version import __version__

PACKAGES = ("onnx", "onnx-ir", "numpy", "torch", "onnxruntime-genai", "onnxruntime-genai-cuda")


@dataclass(frozen=True)
class DeviceMemory:
    """A GPU with what is free on it; None where CUDA does not say."""

    device: cuda.CudaDevice
    free_bytes: int | None


@dataclass(frozen=True)
class GraphPlacement:
    """Where the nodes of a graph run.

    Attributes:
        nodes: by provider.
        on_cpu: operators on the CPU beside CUDA, with their numbers, those that compute shapes left out.
        predicted: whether it is told from the table of kernels, and not from an open session.
        weight_bytes: of its weights and tables.
        problem: why it cannot be opened; None where it can, or where nobody tried.
    """

    name: str
    nodes: dict[str, int]
    on_cpu: dict[str, int]
    predicted: bool
    weight_bytes: int
    problem: str | None = None


@dataclass(frozen=True)
class FolderDiagnosis:
    """An exported folder on a device, which needs so much of its memory for what the runtime opens and one sequence."""

    path: str
    made_for: str
    dtype: str
    graphs: tuple[GraphPlacement, ...]
    needed_bytes: int


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        packages: versions by name; None for one that is not installed.
        onnxruntime: name and version of the one in use, as it says itself.
        onnxruntime_packages: the installed ones that share its folder.
        clash: what is wrong with them; None where one wrote it.
        stray: that none of them wrote it, where it lies and what is installed beside it; None where one did.
        libraries: where each library of the CUDA provider was found; None for one that is missing.
        driver_cuda: the newest CUDA that the driver runs; None without a driver.
        devices: the GPUs that are visible.
        cuda_problem: why CUDA cannot be used; None where it can.
        packed_folder: where packed weights are kept for the CPU; None where nothing is to be.
        packed_bytes: how much lies there.
    """

    python: str
    system: str
    packages: dict[str, str | None]
    onnxruntime: str
    onnxruntime_packages: tuple[str, ...]
    onnxruntime_path: str
    providers: tuple[str, ...]
    clash: str | None
    stray: str | None
    built_for_cuda: str | None
    libraries: dict[str, str | None]
    driver_cuda: str | None
    devices: tuple[DeviceMemory, ...]
    cuda_problem: str | None
    packed_folder: str | None
    packed_bytes: int


def diagnose() -> Diagnosis:
    """Look at this machine; loads CUDA's libraries where there are any."""
    import onnxruntime

    # First the libraries: the driver may lie where only this finds it.
    libraries = cuda.cuda_libraries()
    driver_cuda, devices = _devices()
    used = installation.onnxruntime_in_use()
    cache = cache_folder()
    return Diagnosis(
        python=f"{platform.python_version()} ({sys.executable})",
        system=platform.platform(),
        packages={"retnet-tools": __version__, **used, **{name: _version(name) for name in PACKAGES}},
        onnxruntime=" ".join(*used.items()),
        onnxruntime_packages=tuple(map(str, installation.packages_in_use())),
        onnxruntime_path=str(installation.onnxruntime_folder()),
        providers=tuple(onnxruntime.get_available_providers()),
        clash=installation.package_clash(installation.packages_in_use()),
        stray=installation.stray_folder(),
        built_for_cuda=onnxruntime.cuda_version or None,
        libraries=libraries,
        driver_cuda=driver_cuda,
        devices=devices,
        cuda_problem=device_problem(Device(CUDA.name)),
        packed_folder=None if cache is None else str(cache),
        packed_bytes=0 if cache is None else sum(kept_bytes(cache).values()),
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def device_problem(device: Device) -> str | None:
    """Why a device cannot be used; None where it can, as far as can be told without a graph."""
    try:
        check_device(device)
    except ProviderError as error:
        return str(error)
    return None


def diagnose_folder(folder: Path, device: Device) -> FolderDiagnosis:
    """Where the graphs of an exported folder run: opened on the device where it is usable, else predicted."""
    manifest, usable = read_manifest(folder), device_problem(device) is None
    graphs = tuple(_opened(folder / name, device) if usable else _predicted(folder / name) for name in manifest.graphs)
    # The runtime reads prompts with decoder.onnx.
    opened = [graph for graph in graphs if graph.name != PREFILL_FILE]
    needed = sum(graph.weight_bytes + LIBRARY_BYTES for graph in opened) + state_bytes(manifest, 1, buffers=2)
    return FolderDiagnosis(str(folder), manifest.device, manifest.dtype, graphs, needed)


def _opened(path: Path, device: Device) -> GraphPlacement:
    size = graph_bytes(path)
    try:
        placement = node_placement(open_session(path, device, 1, prepack=False))
    except RetNetToolsError as error:
        return GraphPlacement(path.name, {}, {}, False, size, str(error))
    on_cpu = sum(misplaced(path, device, placement), Counter())
    return GraphPlacement(path.name, placement.counts, dict(on_cpu), False, size)


def _predicted(path: Path) -> GraphPlacement:
    graph = load_graph(path)
    found, total = cpu_nodes(graph), sum(1 for _ in graph.all_nodes())
    refused = [node for node in found if node.reason == "no kernel" or path.name == STEP_FILE]
    nodes = {"CUDA": total - len(found), "CPU": len(found)}
    kinds = Counter(node.operator for node in refused)
    return GraphPlacement(path.name, {k: v for k, v in nodes.items() if v}, dict(kinds), True, graph_bytes(path))


def _devices() -> tuple[str | None, tuple[DeviceMemory, ...]]:
    """The newest CUDA of the driver, and the devices; a driver without devices has none."""
    try:
        driver = cuda.CudaDriver()
    except ProviderError:
        return None, ()
    try:
        return driver.cuda_version, tuple(DeviceMemory(device, _free(device.index)) for device in driver.devices())
    except ProviderError:
        return driver.cuda_version, ()


def _free(index: int) -> int | None:
    try:
        return cuda.cuda_runtime(index).memory()[0]
    except ProviderError:
        return None


def usable_devices(device: Device) -> Sequence[Device]:
    """The CPU, and the device that was asked for where it is another that can be used."""
    cpu = Device(CPU.name)
    return [cpu] if device.kind == cpu.kind or device_problem(device) is not None else [cpu, device]
