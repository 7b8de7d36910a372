"""Export: a checkpoint or an export becomes a folder that keeps the contract (`retnet_tools.graph.contract`)."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from retnet_tools.config import RetNetConfig
from retnet_tools.console import LOG
from retnet_tools.errors import InputError
from retnet_tools.file_records import FileRecord
from retnet_tools.formats import Checkpoint
from retnet_tools.formats.hub import hub_origin
from retnet_tools.formats.provenance import provenance, source_digests
from retnet_tools.formats.storage import StoredTensors, TensorLocation
from retnet_tools.graph import contract, targets
from retnet_tools.graph.cuda_kernels import kernel_version
from retnet_tools.graph.decoders import StepBuilder
from retnet_tools.graph.folder import (
    BlockReader,
    file_bytes,
    float_blocks,
    load_graph,
    read_graphs,
    write_graph,
    write_weights,
)
from retnet_tools.graph.manifest import Manifest, parse_manifest, read_manifest
from retnet_tools.graph.quantization import Quantization
from retnet_tools.graph.weight_tensors import BuiltGraph, WeightTensor
from retnet_tools.inputs import read_words
from retnet_tools.staging import staged_folder
from retnet_tools.tokenizing.carried import CarriedText, carried_text
from retnet_tools.tokenizing.files import TOKENIZER_FILE, load_tokenizer
from retnet_tools.tokenizing.special import GENERATION_FILE, SpecialTokens
from retnet_tools.weights import CountedWeights, canonical_shapes

GRAPH_BYTES = 8 << 20
"""Room for graphs and manifest when the free space is checked."""


@dataclass(frozen=True)
class ExportPlan:
    """What an export will write, known before any weight is read.

    Attributes:
        graphs: by file name, in the order in which they are written.
        text: the tokenizer and the special tokens; copied and made files of it go into the folder.
        files: the text of further files, by name.
        notes: what the user should know, about the checkpoint and about running it.
        quantization: what retnet.json says of it; None for float weights.
        provenance: as retnet.json is to say it; None hashes the checkpoint's files.
        device: whose kernels the graphs are made for.
        opset: the version of ai.onnx.
    """

    checkpoint: Checkpoint
    dtype: str
    state_dtype: str
    ops: str
    graphs: dict[str, BuiltGraph]
    text: CarriedText
    files: Mapping[str, str]
    notes: tuple[str, ...]
    quantization: Quantization | None = None
    provenance: dict[str, Any] | None = None
    device: str = "cpu"
    opset: int = contract.OPSET

    @property
    def tensors(self) -> dict[str, WeightTensor]:
        """The tensors of weights.data, which all graphs share."""
        return {name: tensor for graph in self.graphs.values() for name, tensor in graph.stored.items()}

    @property
    def weight_bytes(self) -> int:
        """Size of weights.data."""
        return file_bytes(self.tensors.values())


def plan_export(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    ops: str,
    state_dtype: str = "float32",
    target: str = "onnx",
    device: str = "cpu",
    opset: int | None = None,
) -> ExportPlan:
    """Build the graphs of a checkpoint, without weights.

    Args:
        opset: the version of ai.onnx; None takes the operator set's usual one.

    Raises:
        UsageError: an operator set, an opset of it, a target or a device that does not exist, or a model that the
            target cannot run.
        InputError: files beside the weights that are not what their names say.
    """
    chosen, operators, config = (
        targets.export_target(target),
        targets.operator_set(ops, device, opset),
        checkpoint.config,
    )
    text = carried_text(checkpoint.tokenizer_files, checkpoint.settings, config.vocab_size)
    files = chosen.files(config, text, targets.target_device(device).genai_provider)
    graphs = {name: make(config, dtype, state_dtype, operators).build() for name, make in chosen.graphs.items()}
    notes = export_notes(checkpoint, text, chosen, dtype, state_dtype)
    kinds = (dtype, state_dtype, ops)
    return ExportPlan(checkpoint, *kinds, graphs, text, files, notes, device=device, opset=operators.opset)


def plan_of_export(folder: Path) -> ExportPlan:
    """The plan that would write an exported folder of float weights again, bit for bit, from the folder itself.

    Tables are read; weights are read when it is written, by blocks of 16 MB.

    Raises:
        InputError: not an exported folder, an incomplete one, or one whose weights are quantized already.
    """
    manifest = read_manifest(folder)
    if manifest.quantization is not None and (scheme := manifest.quantization.blocks) is not None:
        raise InputError(
            f"{folder} is quantized already ({scheme.type})",
            "an export with float weights",
            "quantize the float export, or export the checkpoint again",
        )
    if contract.STEP_FILE in manifest.graphs and contract.DECODER_FILE not in manifest.graphs:
        raise InputError(f"{folder} has no {contract.DECODER_FILE}", "an export of this version", contract.EXPORT_AGAIN)
    tensors = read_graphs(folder, manifest.graphs).tensors
    stored = _weight_tensors(folder, manifest, tensors)
    graphs = {}
    for name, border in manifest.graphs.items():
        graph = load_graph(folder / name)
        own = {weight: stored[weight] for weight in graph.initializers if weight in stored}
        graphs[name] = BuiltGraph(graph, border["inputs"], border["outputs"], own)
    checkpoint = Checkpoint(
        path=folder,
        format=str(manifest.provenance.get("source_format", "unknown")),
        config=manifest.config,
        weights=_canonical(manifest.config, stored, tensors),
        source_files=[],
        tokenizer_files=[folder / name for name in manifest.tokenizer_files],
        notes=list(manifest.provenance.get("notes", ())),
    )
    text, target = _text(folder, manifest), targets.find_target(manifest.graphs)
    made = [name for name in target.own_files if name not in manifest.tokenizer_files and (folder / name).is_file()]
    return ExportPlan(
        checkpoint,
        manifest.dtype,
        manifest.state_dtype,
        manifest.ops,
        graphs,
        text,
        files={name: read_words(folder / name) for name in made},
        notes=export_notes(checkpoint, text, target, manifest.dtype, manifest.state_dtype),
        provenance=manifest.provenance,
        device=manifest.device,
        opset=manifest.opset,
    )


def write_export(
    plan: ExportPlan,
    out: Path,
    *,
    force: bool,
    progress: Callable[[int], None],
    read: BlockReader | None = None,
    texts: Mapping[str, Callable[[Manifest], str]] | None = None,
    quantization: Callable[[], Quantization | None] | None = None,
) -> Manifest:
    """Write the folder: weights.data, then the graphs and retnet.json; all appear at the end.

    The card of a quantized folder goes away when another takes its place, a README of somebody else's stays. Float
    weights with NaN or infinities are written as they are, and a note of the manifest's provenance names them.

    Memory: one block of a source tensor (16 MB), or a whole one where its format transforms it.

    Args:
        progress: called with the bytes of weights just written.
        read: gives the content of weights.data; None reads the checkpoint's float weights.
        texts: further files, by name, and what makes their text of the manifest.
        quantization: what retnet.json is to say of it, called when the weights are written; None takes the plan's.

    Raises:
        UsageError: the folder exists and `force` is off, or it is the checkpoint.
        OutputError: it cannot be written, or the disk is full; nothing is left behind.
        InputError: the checkpoint cannot be read, or a value does not fit `dtype`.
    """
    checkpoint = plan.checkpoint
    with (
        staged_folder(
            out,
            marker=contract.MANIFEST_FILE,
            required_bytes=plan.weight_bytes + GRAPH_BYTES,
            force=force,
            source=checkpoint.path,
            stale=partial(_stale_files, out),
        ) as folder,
        source_digests(checkpoint.source_files) as digests,
    ):
        counted = CountedWeights(checkpoint.weights)
        read = read or float_blocks(counted)
        places, weights = write_weights(folder / contract.WEIGHTS_FILE, plan.tensors.values(), read, progress)
        for file in plan.text.copies:
            shutil.copyfile(file, folder / file.name)
        for name, text in {**plan.text.made, **plan.files}.items():
            (folder / name).write_text(text, encoding="utf-8")
        for name, graph in plan.graphs.items():
            write_graph(folder / name, graph, places)
        for note in counted.notes():
            LOG.warning("warning: %s", note)
        notes = [*checkpoint.notes, *plan.text.notes, *counted.notes()]
        manifest = Manifest(
            config=checkpoint.config,
            dtype=plan.dtype,
            state_dtype=plan.state_dtype,
            ops=plan.ops,
            quantization=quantization() if quantization else plan.quantization,
            provenance=plan.provenance or provenance(checkpoint.format, checkpoint.source_files, digests(), notes),
            graphs={name: {"inputs": graph.inputs, "outputs": graph.outputs} for name, graph in plan.graphs.items()},
            tokenizer_files=plan.text.tokenizer_files,
            device=plan.device,
            opset=plan.opset,
        )
        for name, make_text in (texts or {}).items():
            (folder / name).write_text(make_text(manifest), encoding="utf-8")
        files = {
            file.name: FileRecord.of(file) for file in sorted(folder.iterdir()) if file.name != contract.WEIGHTS_FILE
        }
        manifest = dataclasses.replace(manifest, files={contract.WEIGHTS_FILE: weights, **files})
        (folder / contract.MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def export_notes(
    checkpoint: Checkpoint, text: CarriedText, target: targets.ExportTarget, dtype: str, state_dtype: str
) -> tuple[str, ...]:
    """What the user should know, about the checkpoint and about running it."""
    slow = [str(h) for h, scale in enumerate(contract.state_scale(checkpoint.config, state_dtype)) if scale < 2**-10]
    notes = [*checkpoint.notes, *text.notes, *target.notes(text, dtype)]
    if slow:
        notes.append(
            f"float16 states of head{'s' if len(slow) > 1 else ''} {', '.join(slow)} lose what a token adds below half "
            "a step of float16, since gamma is within 2^-10 of 1: a tenth of the state in places"
        )
    return tuple(notes)


def kernel_notes(plan: ExportPlan) -> tuple[str, ...]:
    """What of an export would not run on its device, graph by graph: nodes that have no kernel there."""
    notes, elsewhere = [], targets.target_device(plan.device).elsewhere
    for name, built in plan.graphs.items():
        missing = [node for node in elsewhere(built.graph) if node.reason == "no kernel"]
        kinds = sorted({f"{node.operator} of {' and '.join(dict.fromkeys(node.types))}" for node in missing})
        if kinds:
            notes.append(f"{name}: onnxruntime {kernel_version()} has no CUDA kernel for {', '.join(kinds)}")
    return tuple(notes)


def default_output(checkpoint: Path, target: str = "onnx") -> Path:
    """`<name>-<target>` beside the checkpoint, or in the current folder where that lies in the hub's cache."""
    if (origin := hub_origin(checkpoint)) is not None:
        return Path(f"{origin.repository.rpartition('/')[2]}-{target}")
    path = checkpoint.resolve() if checkpoint.name in ("", "..") else checkpoint
    return path.with_name(f"{path.stem if path.is_file() else path.name}-{target}")


def _stale_files(out: Path) -> tuple[str, ...]:
    """Files of an earlier export that a new one replaces or removes."""
    replaced: tuple[str, ...] = targets.TARGET_FILES
    try:
        manifest = parse_manifest(out)
        replaced = (*targets.TARGET_FILES, *manifest.tokenizer_files, GENERATION_FILE)
        quantized = manifest.quantization is not None
        card = read_words(out / contract.CARD_FILE).splitlines() if quantized else []
    except InputError:
        # No earlier export, or none with a card that this tool wrote.
        card = []
    return (*replaced, contract.CARD_FILE) if contract.CARD_TITLE in card else replaced


def _canonical(config: RetNetConfig, stored: Mapping[str, WeightTensor], tensors: StoredTensors) -> StoredTensors:
    """The float weights of an exported folder by canonical name: merged matrices are rows one after another."""
    shapes, locations = canonical_shapes(config), {}
    for tensor in stored.values():
        place, start = tensors.locations[tensor.name], 0
        assert isinstance(place, TensorLocation)
        for source in tensor.sources:
            locations[source] = place.rows(start, shapes[source][0])
            start += shapes[source][0]
    return StoredTensors(locations)


def _weight_tensors(folder: Path, manifest: Manifest, tensors: StoredTensors) -> dict[str, WeightTensor]:
    """What each tensor of weights.data is made of; those that belong to no weight are tables."""
    ops = targets.operator_set(manifest.ops, manifest.device, manifest.opset)
    built = StepBuilder(manifest.config, manifest.dtype, manifest.state_dtype, ops).build().stored
    expected = {name: tensor for name, tensor in built.items() if tensor.sources}
    for name, tensor in expected.items():
        found = tensors.info(name) if name in tensors.locations else None
        if found is None or (found.dtype.name, found.shape) != (tensor.dtype, tensor.shape):
            raise InputError(
                f"{folder} holds {'no' if found is None else 'another'} tensor {name!r}",
                f"{tensor.dtype} of shape {list(tensor.shape)}, as its manifest says",
                contract.EXPORT_AGAIN,
            )
    stored = {}
    for name in tensors.names():
        if name in expected:
            stored[name] = expected[name]
        else:
            table = tensors.read(name)
            stored[name] = WeightTensor(name, table.dtype.name, table.shape, table=table)
    return stored


def _text(folder: Path, manifest: Manifest) -> CarriedText:
    """The folder's tokenizer and special tokens as they are. What there is to know of them is in the manifest."""
    copies = tuple(folder / name for name in manifest.tokenizer_files)
    generation = folder / GENERATION_FILE
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE) if folder / TOKENIZER_FILE in copies else None
    made = {GENERATION_FILE: read_words(generation)} if generation.is_file() else {}
    return CarriedText(tokenizer, copies, made, SpecialTokens({}, {}, ()), ())
