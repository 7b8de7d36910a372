"""The devices that exports are made for: one row each, with what its graphs are built of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from retnet_tools.errors import UsageError, did_you_mean
from retnet_tools.graph.cuda_ops import CudaFusedOps, CudaStandardOps
from retnet_tools.graph.ops import OPERATOR_SETS
from retnet_tools.graph.standard_ops import StandardOps


@dataclass(frozen=True)
class TargetDevice:
    """A device to export for. Graphs for one run on the others too, with the same results.

    Attributes:
        operators: its operator sets by name; each names the same for every device.
        genai_provider: what onnxruntime-genai calls it in genai_config.json; None for the CPU, its default.
    """

    name: str
    operators: Mapping[str, StandardOps]
    genai_provider: str | None = None


TARGET_DEVICES: dict[str, TargetDevice] = {
    device.name: device
    for device in (
        TargetDevice("cpu", OPERATOR_SETS),
        TargetDevice("cuda", {ops.name: ops for ops in (CudaStandardOps(), CudaFusedOps())}, genai_provider="cuda"),
    )
}


def target_device(name: str) -> TargetDevice:
    """The device of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in TARGET_DEVICES:
        known = ", ".join(TARGET_DEVICES)
        raise UsageError(f"--device {name!r}", f"one of {known} to export for", did_you_mean(name, TARGET_DEVICES))
    return TARGET_DEVICES[name]


def operator_set(ops: str, device: str) -> StandardOps:
    """The operators of a set as a device uses them.

    Raises:
        UsageError: a set or a device that does not exist.
    """
    operators = target_device(device).operators
    if ops not in operators:
        raise UsageError(f"--ops {ops!r}", f"one of {', '.join(operators)}", did_you_mean(ops, operators))
    return operators[ops]
