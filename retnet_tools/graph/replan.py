"""An exported folder as a plan again: its graphs, its weights under canonical names, its provenance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import InputError
from retnet_tools.formats import Checkpoint
from retnet_tools.formats.storage import StoredTensors, TensorLocation
from retnet_tools.graph.contract import EXPORT_AGAIN
from retnet_tools.graph.decoders import StepBuilder
from retnet_tools.graph.export import ExportPlan, export_notes
from retnet_tools.graph.manifest import Manifest, read_manifest
from retnet_tools.graph.reader import load_graph, read_graphs
from retnet_tools.graph.targets import find_target, operator_set
from retnet_tools.graph.weight_tensors import WeightTensor
from retnet_tools.graph.weighted import BuiltGraph
from retnet_tools.tokenizing.carried import CarriedText
from retnet_tools.tokenizing.files import TOKENIZER_FILE, load_tokenizer
from retnet_tools.tokenizing.special import GENERATION_FILE, SpecialTokens
from retnet_tools.weights import canonical_shapes


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
    text, target = _text(folder, manifest), find_target(manifest.graphs)
    made = [name for name in target.own_files if name not in manifest.tokenizer_files and (folder / name).is_file()]
    return ExportPlan(
        checkpoint,
        manifest.dtype,
        manifest.state_dtype,
        manifest.ops,
        graphs,
        text,
        files={name: (folder / name).read_text(encoding="utf-8") for name in made},
        notes=export_notes(checkpoint, text, target, manifest.dtype, manifest.state_dtype),
        provenance=manifest.provenance,
        device=manifest.device,
    )


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
    ops = operator_set(manifest.ops, manifest.device)
    built = StepBuilder(manifest.config, manifest.dtype, manifest.state_dtype, ops).build().stored
    expected = {name: tensor for name, tensor in built.items() if tensor.sources}
    for name, tensor in expected.items():
        found = tensors.info(name) if name in tensors.locations else None
        if found is None or (found.dtype.name, found.shape) != (tensor.dtype, tensor.shape):
            raise InputError(
                f"{folder} holds {'no' if found is None else 'another'} tensor {name!r}",
                f"{tensor.dtype} of shape {list(tensor.shape)}, as its manifest says",
                EXPORT_AGAIN,
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
    made = {GENERATION_FILE: generation.read_text(encoding="utf-8")} if generation.is_file() else {}
    return CarriedText(tokenizer, copies, made, SpecialTokens({}, {}, ()), ())
