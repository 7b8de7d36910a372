"""What `export` can write, and the devices that it writes for: one row each, found by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import InputError, UsageError, find_row
from retnet_tools.graph import contract
from retnet_tools.graph.builder import DecoderBuilder
from retnet_tools.graph.cuda_kernels import CpuNode, cpu_nodes
from retnet_tools.graph.cuda_ops import CudaFusedOps, CudaStandardOps
from retnet_tools.graph.decoders import AnyLengthBuilder, PrefillBuilder, StepBuilder
from retnet_tools.graph.genai import GenaiBuilder, genai_files, genai_notes
from retnet_tools.graph.ops import LATER_OPERATOR_SETS, OPERATOR_SETS, StandardOps
from retnet_tools.tokenizing.carried import CarriedText
from retnet_tools.tokenizing.files import COMPANIONS, TOKENIZER_FILE
from retnet_tools.tokenizing.special import GENERATION_FILE, TOKENIZER_CONFIG_FILE


@dataclass(frozen=True)
class ExportTarget:
    """A kind of exported folder.

    Attributes:
        graphs: the builder of each graph file, in the order in which they are written.
        files: text files that it needs besides, by name, of a model, its tokenizer and onnxruntime-genai's name of a
            provider; refuses models that it cannot run.
        notes: what the user should know, of a tokenizer and a type of weights.
        own_files: names of `files` that are no part of a tokenizer.
    """

    name: str
    graphs: Mapping[str, type[DecoderBuilder]]
    files: Callable[[RetNetConfig, CarriedText, str | None], Mapping[str, str]] = lambda config, text, provider: {}
    notes: Callable[[CarriedText, str], tuple[str, ...]] = lambda text, dtype: ()
    own_files: tuple[str, ...] = ()


@dataclass(frozen=True)
class TargetDevice:
    """A device to export for. Graphs for one run on the others too, with the same results.

    Attributes:
        operators: its operator sets by name; each names the same for every device.
        later: sets of the same names in other opsets than those.
        genai_provider: what onnxruntime-genai calls it in genai_config.json; None for the CPU, its default.
        elsewhere: the nodes of a graph that would not run there.
    """

    name: str
    operators: Mapping[str, StandardOps]
    genai_provider: str | None = None
    elsewhere: Callable[[ir.Graph], list[CpuNode]] = lambda graph: []
    later: tuple[StandardOps, ...] = ()

    def opsets(self, ops: str) -> dict[int, StandardOps]:
        """The sets of a name that there is, by opset, first the one that is taken where no opset is asked for."""
        return {row.opset: row for row in (self.operators[ops], *self.later) if row.name == ops}


TARGETS: dict[str, ExportTarget] = {
    target.name: target
    for target in (
        ExportTarget(
            "onnx",
            {
                contract.PREFILL_FILE: PrefillBuilder,
                contract.STEP_FILE: StepBuilder,
                contract.DECODER_FILE: AnyLengthBuilder,
            },
        ),
        ExportTarget(
            "genai",
            {contract.GENAI_FILE: GenaiBuilder},
            genai_files,
            genai_notes,
            (contract.GENAI_CONFIG_FILE, TOKENIZER_CONFIG_FILE),
        ),
    )
}
TARGET_FILES = (*(name for target in TARGETS.values() for name in target.graphs), contract.GENAI_CONFIG_FILE)
"""Files of any target: those that a new export in the same folder replaces or removes."""
READ_FILES = (*TARGET_FILES, contract.WEIGHTS_FILE, TOKENIZER_FILE, *COMPANIONS, GENERATION_FILE)
"""Files of an export that somebody reads where they are there."""
TARGET_DEVICES: dict[str, TargetDevice] = {
    device.name: device
    for device in (
        TargetDevice("cpu", OPERATOR_SETS, later=LATER_OPERATOR_SETS),
        TargetDevice("cuda", {ops.name: ops for ops in (CudaStandardOps(), CudaFusedOps())}, "cuda", cpu_nodes),
    )
}


def export_target(name: str) -> ExportTarget:
    """The target of a name; a UsageError where there is none."""
    return find_row(TARGETS, "--to", name)


def target_device(name: str) -> TargetDevice:
    """The device of a name; a UsageError where there is none."""
    return find_row(TARGET_DEVICES, "--device", name, " to export for")


def operator_set(ops: str, device: str, opset: int | None = None) -> StandardOps:
    """The operators of a set as a device uses them, in the set's usual opset where none is asked for.

    Raises:
        UsageError: there is no such set or device, or the set has no such opset there.
    """
    row = target_device(device)
    usual, opsets = find_row(row.operators, "--ops", ops), row.opsets(ops)
    if opset is not None and opset not in opsets:
        known = " or ".join(map(str, opsets))
        others = [
            f"--ops {other.name} --device {place.name}"
            for place in TARGET_DEVICES.values()
            for other in place.later
            if other.opset == opset
        ]
        raise UsageError(
            f"--opset {opset} with --ops {ops} --device {device}", known, f"or {', '.join(others)}" if others else ""
        )
    return usual if opset is None else opsets[opset]


def find_target(graphs: Iterable[str]) -> ExportTarget:
    """The target of an exported folder by the graph files that its manifest lists, all or some of the target's.

    Raises:
        InputError: no target writes these.
    """
    names = set(graphs)
    for target in TARGETS.values():
        if names and names <= set(target.graphs):
            return target
    known = " | ".join(", ".join(target.graphs) for target in TARGETS.values())
    raise InputError(f"an export of {', '.join(sorted(names)) or 'no graphs'}", known, contract.EXPORT_AGAIN)
