"""What is measured: a RetNet as an exported folder, and a Transformer and probes in the same types."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from retnet_tools.bench.floor import COPY_FILE, PRODUCT_FILE, ProductShape, copy_graph, product_graph
from retnet_tools.bench.transformer_graph import (
    TRANSFORMER_FILE,
    TransformerBuilder,
    TransformerConfig,
    transformer_shapes,
)
from retnet_tools.config import RetNetConfig
from retnet_tools.dtypes import FloatName
from retnet_tools.errors import OutputError, UsageError
from retnet_tools.formats import Checkpoint, CheckpointSource
from retnet_tools.graph.contract import DECODER_FILE, MANIFEST_FILE, STEP_FILE, WEIGHTS_FILE
from retnet_tools.graph.export import ExportPlan, plan_export, plan_of_export
from retnet_tools.graph.folder import file_bytes, float_blocks, write_graph, write_weights
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.graph.ops import FusedOps
from retnet_tools.graph.quantization import Scheme
from retnet_tools.graph.weight_tensors import BuiltGraph
from retnet_tools.paper import VOCABULARY_SIZE, model_size
from retnet_tools.progress import Progress
from retnet_tools.quantize.contents import QuantizedContents
from retnet_tools.quantize.methods import round_to_nearest
from retnet_tools.quantize.options import QuantizeOptions
from retnet_tools.quantize.rewrite import quantize_graph
from retnet_tools.quantize.steps import plan_quantized, write_quantized
from retnet_tools.random_weights import RandomWeights
from retnet_tools.staging import staged_folder
from retnet_tools.weights import WeightSource, canonical_shapes

EXPORT_FOLDER, PROBE_FOLDER = "retnet", "probes"


@dataclass(frozen=True)
class Precision:
    """Types of a model: floats, the quantization of its matrices or None, and its operators."""

    dtype: str
    scheme: Scheme | None
    ops: str

    @property
    def quantization(self) -> str | None:
        """The scheme in a word or two, such as `int8 in 128s`, or `int4 in 64s, mixed` where matrices differ."""
        if self.scheme is None:
            return None
        return f"{self.scheme.type} in {self.scheme.block_size}s" + (", mixed" if self.mixed else "")

    @property
    def mixed(self) -> bool:
        """Whether some matrices are of another type than the rest, or float."""
        return self.scheme is not None and bool(self.scheme.exclude or self.scheme.tensor_types)


@dataclass(frozen=True)
class Model:
    """A RetNet that is ready to be measured.

    Attributes:
        name: for reports.
        folder: the export.
        weights: its float weights by canonical name; None where it has only quantized ones.
    """

    name: str
    folder: Path
    config: RetNetConfig
    precision: Precision
    state_dtype: str
    weights: WeightSource | None


@dataclass(frozen=True)
class ModelOptions:
    """Which model to measure: at most one of a source and a size; None takes the default of each type.

    Attributes:
        source: an exported folder or a checkpoint.
        size: a published size, with random weights.
        quantize: how to quantize it, if at all.
        device: whose kernels a checkpoint is exported for.
    """

    source: CheckpointSource | None
    size: str | None
    dtype: FloatName | None
    quantize: QuantizeOptions | None
    ops: str | None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.source is not None and self.size is not None:
            raise UsageError(f"both {self.source.path} and --size {self.size}", "one of them")
        if self.size is not None:
            model_size(self.size)

    @property
    def path(self) -> Path | None:
        """Where the source lies."""
        return None if self.source is None else self.source.path


def plan_model(options: ModelOptions) -> ExportPlan | None:
    """What has to be written before the model can be measured; None for an exported folder as it is.

    Raises:
        UsageError: types for an exported folder, which has its own.
        InputError: no exported folder and no checkpoint.
    """
    source = options.source
    if source is not None and not source.says_how and (source.path / MANIFEST_FILE).is_file():
        for option, value in (("--dtype", options.dtype), ("--ops", options.ops)):
            if value is not None:
                raise UsageError(f"{option} {value} for {source.path}, an export with its own", f"no {option}")
        if options.quantize is None:
            return None
        plan = plan_of_export(source.path)
    else:
        checkpoint = _checkpoint(options)
        dtype, ops = options.dtype or "float32", options.ops or "fused"
        plan = plan_export(checkpoint, dtype=dtype, ops=ops, device=options.device)
    return plan if options.quantize is None else plan_quantized(plan, options.quantize)


def make_model(options: ModelOptions, scratch: Path, progress: Progress, *, copies: int = 1) -> Model:
    """The model, written to a folder in `scratch` where it is no export yet.

    Args:
        copies: how many models of its size will lie there.

    Raises:
        UsageError, InputError: as `plan_model`, or a folder without `step.onnx` or `decoder.onnx`.
        OutputError: no room for them.
    """
    plan, folder = plan_model(options), options.path
    if plan is not None:
        _check_space(scratch, copies * plan.weight_bytes)
        folder = scratch / EXPORT_FOLDER
        write_quantized(plan, folder, force=False, progress=progress)
    assert folder is not None
    manifest = read_manifest(folder)
    for name in (STEP_FILE, DECODER_FILE):
        if name not in manifest.graphs:
            raise UsageError(f"{folder} has no {name}", "an export for ONNX Runtime", "export with --to onnx")
    scheme = None if manifest.quantization is None else manifest.quantization.blocks
    if plan is None and scheme is None:
        plan = plan_of_export(folder)
    return Model(
        name=options.size or str(options.path),
        folder=folder,
        config=manifest.config,
        precision=Precision(manifest.dtype, scheme, manifest.ops),
        state_dtype=manifest.state_dtype,
        weights=None if plan is None else plan.checkpoint.weights,
    )


def write_transformer(config: TransformerConfig, precision: Precision, folder: Path) -> Path:
    """A Transformer with random weights in a folder."""
    graph = TransformerBuilder(config, precision.dtype).build()
    return _write(folder, {TRANSFORMER_FILE: graph}, transformer_shapes(config), precision)


def write_probes(shape: ProductShape, precision: Precision, folder: Path) -> Path:
    """The graphs that measure the device, in a folder."""
    graphs = {PRODUCT_FILE: product_graph(shape), COPY_FILE: copy_graph()}
    # The type of most matrices: rules are about names that the probe does not have.
    scheme = precision.scheme and dataclasses.replace(precision.scheme, exclude=(), tensor_types=())
    plain = dataclasses.replace(precision, dtype=shape.input_dtype, scheme=scheme)
    return _write(folder, graphs, shape.shapes, plain)


def _check_space(scratch: Path, needed: int) -> None:
    free = shutil.disk_usage(scratch).free
    if free < needed:
        raise OutputError(
            f"{free / 1e9:.2f} GB free in {scratch}",
            f"{needed / 1e9:.2f} GB",
            "name another with --folder",
        )


def _checkpoint(options: ModelOptions) -> Checkpoint:
    if options.size is None:
        assert options.source is not None
        return options.source.open()
    config = model_size(options.size).config(VOCABULARY_SIZE)
    weights = RandomWeights(canonical_shapes(config))
    return Checkpoint(Path(options.size), "random", config, weights, [], [], [])


def _write(
    folder: Path, graphs: Mapping[str, BuiltGraph], shapes: Mapping[str, tuple[int, ...]], precision: Precision
) -> Path:
    """Graphs with random weights, quantized as the precision says."""
    source, scheme = RandomWeights(shapes), precision.scheme
    read = float_blocks(source)
    if scheme is not None:
        formats = {name: scheme.format_of(name) for name, shape in shapes.items() if len(shape) == 2}
        level, ops = scheme.accuracy_level, FusedOps()
        graphs = {name: quantize_graph(graph, ops, formats, shapes, level) for name, graph in graphs.items()}
        read = QuantizedContents(source, round_to_nearest, precision.dtype)
    tensors = {name: tensor for graph in graphs.values() for name, tensor in graph.stored.items()}
    marker, required = next(iter(graphs)), file_bytes(tensors.values())
    with staged_folder(folder, marker=marker, required_bytes=required, force=False) as partial:
        places, _ = write_weights(partial / WEIGHTS_FILE, tensors.values(), read, progress=lambda count: None)
        for name, graph in graphs.items():
            write_graph(partial / name, graph, places)
    return folder
