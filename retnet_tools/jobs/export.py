"""A checkpoint to a folder with a stateful ONNX decoder, and what every such folder goes through."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from retnet_tools.errors import RetNetToolsError, UsageError, find_row
from retnet_tools.graph.code_types import BlockSize
from retnet_tools.graph.quantization import AccuracyLevel
from retnet_tools.jobs.inspect import layer_state_bytes
from retnet_tools.jobs.request import CheckpointRequest, Request, parse_size
from retnet_tools.progress import Progress, in_megabytes, no_progress

if TYPE_CHECKING:
    from retnet_tools.formats import CheckpointSource
    from retnet_tools.graph.export import ExportPlan
    from retnet_tools.graph.quantization import Quality
    from retnet_tools.quantize.options import QuantizeOptions
    from retnet_tools.quantize.unfinished import Workplace

NO_BFLOAT16 = (
    "ONNX Runtime has no bfloat16 kernels on the CPU, for which this is built: it runs on CUDA alone "
    "(--device cuda builds for that); fp16 runs on both"
)


@dataclass(frozen=True)
class WriteRequest(Request):
    """How an exported folder is to be quantized and written; `retnet_tools.quantize.options` says more of the former.

    Attributes:
        block_size: weights that share a scale: 32, 64 or 128; by type if left out.
        symmetric: without or with a zero point a block; symmetric if left out.
        accuracy_level: of products on the CPU: 4 in int8 (if left out), 0 or 1 in float32, slow with int8 weights.
        method: how weights are rounded: rtn (to nearest, if left out) or gptq, which learns from a text.
        exclude: matrices that stay float, by their names.
        tensor_types: another type for some matrices, by their names: REGEX=TYPE.
        calibration: text to learn from, for gptq and for targets.
        calibration_tokens: tokens drawn from it (65536 if left out).
        seed: seed of that draw (0 if left out).
        target_size: size of weights.data to keep to, such as 5MB, by mixed types.
        target_bits: the same as bits a weight over all matrices, such as 5.0.
        keep_merged: with a target: one type for matrices that the graph keeps as one.
        text: measure what it cost on this text, against the float model; kept in the folder.
        text_tokens: tokens of that text to use at most.
        force: replace an export that is there.
        dry_run: say what would be written, and stop.
    """

    _: KW_ONLY
    block_size: BlockSize | None = None
    symmetric: bool | None = None
    accuracy_level: AccuracyLevel | None = None
    method: str | None = None
    exclude: Sequence[str] = ()
    tensor_types: Sequence[str] = ()
    calibration: Path | str | None = None
    calibration_tokens: int | None = None
    seed: int | None = None
    target_size: str | int | None = None
    target_bits: float | None = None
    keep_merged: bool = False
    text: Path | str | None = None
    text_tokens: int | None = None
    force: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method is not None:
            from retnet_tools.quantize.methods import METHODS

            find_row(METHODS, "--method", self.method)
        if self.target_size is not None:
            self.settle(target_size=parse_size(self.target_size))
        if self.text is None and self.text_tokens is not None:
            raise UsageError("--text-tokens without a text", "--text FILE")

    def options_for(self, type: str | None) -> QuantizeOptions | None:
        """How to quantize to a type of weights; None without one.

        Raises:
            UsageError: options that do not fit it or one another.
        """
        from retnet_tools.quantize.options import options_of

        return options_of(
            type,
            block_size=self.block_size,
            symmetric=self.symmetric,
            accuracy_level=self.accuracy_level,
            method=self.method,
            exclude=tuple(self.exclude),
            tensor_types=tuple(self.tensor_types),
            calibration=None if self.calibration is None else Path(self.calibration),
            calibration_tokens=self.calibration_tokens,
            seed=self.seed,
            target_size=None if self.target_size is None else parse_size(self.target_size),
            target_bits=self.target_bits,
            keep_merged=self.keep_merged,
        )


@dataclass(frozen=True)
class ExportRequest(CheckpointRequest, WriteRequest):
    """A checkpoint to export.

    Attributes:
        output: folder to make; <name>-<to> beside the checkpoint if left out, or here from the hub.
        to: what to write: onnx, or genai for onnxruntime-genai.
        dtype: weights and activations: fp32, fp16 or bf16.
        state_dtype: recurrent states between calls: fp32 or fp16 (scaled, within range).
        ops: operators: fused (ONNX Runtime's contrib operators) or standard (ai.onnx only).
        opset: version of ai.onnx: 23 (if left out), or 27 of standard operators, with retention as LinearAttention.
        device: whose kernels to build for: cpu or cuda; runs on both.
        quantize: int8, int4 or another type of codes for weights in blocks; fp16 or bf16 for everything but states.
    """

    output: Path | str | None = None
    _: KW_ONLY
    to: str = "onnx"
    dtype: str = "fp32"
    state_dtype: str = "fp32"
    ops: str = "fused"
    opset: int | None = None
    device: str = "cpu"
    quantize: str | None = None

    def __post_init__(self) -> None:
        from retnet_tools.dtypes import parse_dtype
        from retnet_tools.graph.targets import export_target, operator_set

        super().__post_init__()
        if (options := self.options_for(self.quantize)) is not None:
            self.settle(quantize=options.word)
            if not options.is_half:
                options.scheme(self.ops)
        export_target(self.to)
        self.settle(
            dtype=parse_dtype(self.dtype, ("float32", "float16", "bfloat16")),
            state_dtype=parse_dtype(self.state_dtype, ("float32", "float16")),
        )
        operator_set(self.ops, self.device, self.opset)

    @property
    def ending(self) -> str:
        """What the name of the folder ends with, where none is given."""
        words = (self.to, self.quantize, None if self.device == "cpu" else self.device)
        return "-".join(word for word in words if word is not None)


@dataclass(frozen=True)
class ExportResult:
    """What was written, or would be.

    Attributes:
        request: an `ExportRequest` or a `QuantizeRequest`.
        folder: where.
        plan: graphs, tensors and notes, as written.
        quality: what quantization cost, where it was measured.
        kept: the folder of results that a dry run has kept for the run that writes, if any.
    """

    request: WriteRequest = field(repr=False)
    folder: Path
    plan: ExportPlan = field(repr=False)
    quality: Quality | None
    kept: Path | None

    @property
    def state_bytes(self) -> int:
        """Bytes of the recurrent states of one sequence, at any length."""
        config = self.plan.checkpoint.config
        return config.num_layers * layer_state_bytes(config, self.plan.state_dtype)

    @property
    def position_table_bytes(self) -> int:
        """Bytes of weights.data that are tables of positions, and no weights."""
        return sum(tensor.stored_bytes for tensor in self.plan.tensors.values() if tensor.table is not None)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, about the checkpoint and about running the folder."""
        from retnet_tools.graph.contract import FIRST_ONNXRUNTIME
        from retnet_tools.graph.export import kernel_notes
        from retnet_tools.quantize.card import coarse_text

        record = self.plan.quantization
        coarse = (coarse_text(record, self.plan.dtype),) if record is not None and record.coarse_blocks else ()
        lacking = (NO_BFLOAT16,) if (self.plan.dtype, self.plan.device) == ("bfloat16", "cpu") else ()
        newer = FIRST_ONNXRUNTIME.get(self.plan.opset)
        needed = () if newer is None else (f"opset {self.plan.opset} runs in onnxruntime {newer} and later",)
        return (*self.plan.notes, *coarse, *lacking, *needed, *kernel_notes(self.plan))


def export(request: ExportRequest, progress: Progress = no_progress) -> ExportResult:
    """Write a decoder that takes and returns its states `[B, H, K, V]`, a layer each: step.onnx, prefill.onnx and
    decoder.onnx, or model.onnx and genai_config.json, each with weights.data and retnet.json.

    Memory: one block of a tensor (16 MB), or a whole one where its format transforms it; more where types or codes are
    learnt from a text. Nothing is left behind by a run that fails; what took long to learn is kept for the next one.

    Raises:
        UsageError: an output that exists, a model that the target cannot run, or options that do not fit the model.
        InputError: a checkpoint or a text that cannot be read.
        OutputError: an output that cannot be written.

    An error behind a written folder, while what was lost is measured or put down in it, has the `ExportResult` as its
    `result`.
    """
    from retnet_tools.graph.export import default_output, plan_export

    source = request.source()
    folder = default_output(source.path, request.ending) if request.output is None else Path(request.output)
    check_output(request, folder, source.path, quantized=request.quantize is not None)
    plan = plan_export(
        source.open(),
        dtype=request.dtype,
        ops=request.ops,
        state_dtype=request.state_dtype,
        target=request.to,
        device=request.device,
        opset=request.opset,
    )
    return write(request, plan, request.options_for(request.quantize), folder, source, progress)


def check_output(request: WriteRequest, folder: Path, source: Path, *, quantized: bool) -> None:
    """Check, before anything is read, that a folder may be written, and that it is not its own source.

    Raises:
        UsageError, OutputError: it may not.
    """
    from retnet_tools.graph.contract import MANIFEST_FILE
    from retnet_tools.quantize.card import check_card
    from retnet_tools.staging import check_folder

    if not request.dry_run:
        check_folder(folder, marker=MANIFEST_FILE, force=request.force, source=source)
        if quantized:
            check_card(folder)


def write(
    request: WriteRequest,
    plan: ExportPlan,
    options: QuantizeOptions | None,
    folder: Path,
    source: CheckpointSource,
    progress: Progress,
) -> ExportResult:
    """Quantize a plan of float weights, write its folder, and measure what was lost; each where it is asked for.

    Args:
        source: the float model.
    """
    from retnet_tools.evaluate.logits import open_logits
    from retnet_tools.evaluate.quality import check_measurable, measure_quality, record_quality
    from retnet_tools.graph.export import write_export
    from retnet_tools.quantize.steps import plan_quantized, write_quantized
    from retnet_tools.tokenizing.text_files import read_text

    text = None if request.text is None else read_text(Path(request.text))
    if text is not None:
        check_measurable(plan, None if options is None else options.type, text, request.text_tokens)
    with _workplace(folder) as work:
        if options is not None:
            unseen = None if text is None else text.sha256
            plan = plan_quantized(plan, options, work=work, progress=progress, unseen=unseen)
        if request.dry_run:
            return ExportResult(request, folder, plan, None, work.folder if work.kept else None)
        if options is not None:
            manifest = write_quantized(plan, folder, force=request.force, work=work, progress=progress)
        else:
            told = in_megabytes(progress, "write", plan.weight_bytes)
            manifest = write_export(plan, folder, force=request.force, progress=told)
    notes = tuple(dict.fromkeys((*plan.notes, *manifest.provenance["notes"])))
    plan = dataclasses.replace(plan, quantization=manifest.quantization, notes=notes)
    result = ExportResult(request, folder, plan, None, None)
    if text is None:
        return result
    try:
        quality = measure_quality(folder, open_logits(source), text, limit=request.text_tokens, progress=progress)
        result = dataclasses.replace(result, quality=quality)
        record_quality(folder, quality)
    except RetNetToolsError as error:
        error.result = result
        raise
    return result


@contextmanager
def _workplace(folder: Path) -> Iterator[Workplace]:
    """A place for results that are worth keeping if a run is stopped, of which the error then has a note."""
    from retnet_tools.quantize.unfinished import Workplace, unfinished_folder

    with Workplace(unfinished_folder(folder)) as work:
        try:
            yield work
        except BaseException as error:
            if work.kept:
                error.add_note(f"what was done is kept in {work.folder}; the same command goes on from there")
            raise
