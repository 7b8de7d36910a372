"""Export: a checkpoint becomes a folder that keeps the contract (`retnet_tools.graph.contract`)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retnet_tools import __version__
from retnet_tools.errors import UsageError, did_you_mean
from retnet_tools.formats import Checkpoint
from retnet_tools.graph import contract
from retnet_tools.graph.builder import BuiltGraph, DecoderBuilder
from retnet_tools.graph.manifest import Manifest
from retnet_tools.graph.ops import OPERATOR_SETS
from retnet_tools.graph.prefill import PrefillBuilder
from retnet_tools.graph.quantization import Quantization
from retnet_tools.graph.step import StepBuilder
from retnet_tools.graph.stored import StoredTensor, stored_bytes
from retnet_tools.graph.writer import ALIGNMENT, BlockReader, float_blocks, write_graph, write_weights
from retnet_tools.provenance import SourceHasher, provenance
from retnet_tools.staging import check_target, staged_folder

GRAPH_BYTES = 8 << 20
"""Room for graphs and manifest when the free space is checked."""
BUILDERS: dict[str, type[DecoderBuilder]] = {contract.PREFILL_FILE: PrefillBuilder, contract.STEP_FILE: StepBuilder}
"""What builds each graph file, in the order in which they are written."""


@dataclass(frozen=True)
class ExportPlan:
    """What an export will write, known before any weight is read.

    Attributes:
        graphs: by file name, in the order in which they are written.
        quantization: what retnet.json says of it; None for float weights.
        provenance: as retnet.json is to say it; None hashes the checkpoint's files.
    """

    checkpoint: Checkpoint
    dtype: str
    state_dtype: str
    ops: str
    graphs: dict[str, BuiltGraph]
    quantization: Quantization | None = None
    provenance: dict[str, Any] | None = None

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """The tensors of weights.data, which all graphs share."""
        return {name: tensor for graph in self.graphs.values() for name, tensor in graph.stored.items()}

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(stored_bytes, self.tensors.values()))

    @property
    def weight_bytes(self) -> int:
        """Size of weights.data, in which tensors are aligned."""
        return sum(-(-stored_bytes(tensor) // ALIGNMENT) * ALIGNMENT for tensor in self.tensors.values())


def plan_export(checkpoint: Checkpoint, *, dtype: str, ops: str, state_dtype: str = "float32") -> ExportPlan:
    """Build the graphs of a checkpoint, without weights.

    Raises:
        UsageError: an operator set that does not exist.
    """
    if ops not in OPERATOR_SETS:
        raise UsageError(f"--ops {ops!r}", f"one of {', '.join(OPERATOR_SETS)}", did_you_mean(ops, OPERATOR_SETS))
    graphs = {
        name: builder(checkpoint.config, dtype, state_dtype, OPERATOR_SETS[ops]).build()
        for name, builder in BUILDERS.items()
    }
    return ExportPlan(checkpoint, dtype, state_dtype, ops, graphs)


def write_export(
    plan: ExportPlan,
    out: Path,
    *,
    force: bool,
    progress: Callable[[int], None],
    read: BlockReader | None = None,
    texts: Mapping[str, Callable[[Manifest], str]] | None = None,
) -> Manifest:
    """Write the folder: weights.data, then prefill.onnx, step.onnx and retnet.json; all appear at the end.

    Memory: one block of a source tensor (16 MB), or a whole one where its format transforms it.

    Args:
        plan: from `plan_export`.
        out: the folder to make.
        force: replace a folder that an earlier export wrote.
        progress: called with the bytes of weights just written.
        read: gives the content of weights.data; None reads the checkpoint's float weights.
        texts: further files, by name, and what makes their text.

    Raises:
        UsageError: the folder exists and `force` is off.
        OutputError: it cannot be written, or the disk is full; nothing is left behind.
        InputError: the checkpoint cannot be read, or a value does not fit `dtype`.
    """
    check_target(out, marker=contract.MANIFEST_FILE, force=force)
    checkpoint = plan.checkpoint
    with (
        staged_folder(out, marker=contract.MANIFEST_FILE, required_bytes=plan.weight_bytes + GRAPH_BYTES) as folder,
        SourceHasher(checkpoint.source_files) as hasher,
    ):
        read = read or float_blocks(checkpoint.weights)
        places = write_weights(folder / contract.WEIGHTS_FILE, plan.tensors.values(), read, progress)
        for file in checkpoint.tokenizer_files:
            shutil.copyfile(file, folder / file.name)
        for name, graph in plan.graphs.items():
            write_graph(folder / name, graph, places, producer_version=__version__)
        manifest = _manifest(plan, hasher.digests())
        for name, make_text in (texts or {}).items():
            (folder / name).write_text(make_text(manifest), encoding="utf-8")
        (folder / contract.MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def default_output(checkpoint: Path) -> Path:
    """`<name>-onnx` beside the checkpoint."""
    path = checkpoint.resolve() if checkpoint.name in ("", "..") else checkpoint
    return path.with_name(f"{path.stem if path.is_file() else path.name}-onnx")


def _manifest(plan: ExportPlan, digests: Sequence[str]) -> Manifest:
    checkpoint = plan.checkpoint
    border = (checkpoint.config, plan.state_dtype)
    graphs = {
        contract.PREFILL_FILE: {
            "inputs": contract.prefill_inputs(*border),
            "outputs": contract.prefill_outputs(*border),
        },
        contract.STEP_FILE: {"inputs": contract.step_inputs(*border), "outputs": contract.step_outputs(*border)},
    }
    return Manifest(
        config=checkpoint.config,
        dtype=plan.dtype,
        state_dtype=plan.state_dtype,
        ops=plan.ops,
        quantization=plan.quantization,
        provenance=plan.provenance or provenance(checkpoint.format, checkpoint.source_files, digests, checkpoint.notes),
        graphs=graphs,
        tokenizer_files=tuple(file.name for file in checkpoint.tokenizer_files),
    )
