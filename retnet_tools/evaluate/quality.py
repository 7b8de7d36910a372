"""What quantization cost: a quantized folder measured against its float parent, and put down in it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from retnet_tools.errors import UsageError
from retnet_tools.evaluate.logits import ExportLogits, LogitsSource
from retnet_tools.evaluate.perplexity import measure_perplexity
from retnet_tools.evaluate.scored_text import read_tokens
from retnet_tools.evaluate.scoring import Windows
from retnet_tools.graph.code_types import CODE_TYPES, HALF_TYPES
from retnet_tools.graph.contract import STEP_FILE
from retnet_tools.graph.export import ExportPlan
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.graph.quantization import Quality
from retnet_tools.progress import Progress, no_progress
from retnet_tools.quantize.card import update_record
from retnet_tools.tokenizing.text_files import Text

WINDOWS = Windows(512)
"""How the text is cut: the windows that `perplexity` uses where nothing else is said."""


@dataclass
class _Planned:
    """What reads the text, before it is written."""

    name: str
    vocab_size: int
    tokenizer_files: tuple[Path, ...]


def check_measurable(plan: ExportPlan, target: str | None, text: Text, limit: int | None = None) -> None:
    """Check before anything is planned, measured or written that what will be written can be measured on a text.

    Args:
        plan: of float weights.
        target: the type that it is to be quantized to, if any.
        limit: tokens of the text to take at most.

    Raises:
        UsageError: float weights, graphs that this runtime does not step, a type that it cannot compute with, a model
            without vocabulary or tokenizer, a text that is too short.
        InputError: a tokenizer that cannot be read.
    """
    checkpoint, dtype = plan.checkpoint, target if target in HALF_TYPES else plan.dtype
    if target is None:
        raise UsageError(
            f"--text with {dtype}", "--quantize with a type", "perplexity --against measures any two models"
        )
    if STEP_FILE not in plan.graphs:
        raise UsageError(f"--text for {', '.join(plan.graphs)}", "an export of --to onnx", "leave --text out")
    if dtype == "bfloat16":
        raise UsageError(
            "--text with bfloat16, for which ONNX Runtime has no CPU kernels", "float32 or float16", "leave --text out"
        )
    if not checkpoint.config.has_vocabulary:
        raise UsageError("--text for a stack without embedding", "a model with a vocabulary", "leave --text out")
    reader = _Planned(str(checkpoint.path), checkpoint.config.vocab_size, tuple(checkpoint.tokenizer_files))
    next(WINDOWS.rows(len(read_tokens(text.content, reader, limit=limit).ids)))


def measure_quality(
    folder: Path,
    baseline: LogitsSource,
    text: Text,
    *,
    limit: int | None = None,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> Quality:
    """Measure a quantized folder against its float parent.

    Args:
        folder: what `quantize` wrote.
        baseline: the float model.
        text: one that the quantization has not seen, if the figures are to say anything about other texts.
        limit: tokens of it to take at most.

    Raises:
        UsageError: a folder of float weights, or a text that is too short.
        InputError: as `measure_perplexity`.
    """
    record = read_manifest(folder).quantization
    if record is None:
        raise UsageError(
            f"{folder} has float weights", " or ".join(CODE_TYPES), "perplexity --against measures any two models"
        )
    source = ExportLogits(folder, threads=threads)
    tokens = read_tokens(text.content, source, baseline, limit=limit)
    report = measure_perplexity(source, tokens, WINDOWS, baseline=baseline, progress=progress)
    assert report.baseline is not None
    assert report.divergence is not None
    return Quality(
        text=text.name,
        sha256=text.sha256,
        tokens=report.scored_tokens,
        perplexity=report.model.ppl.value,
        float_perplexity=report.baseline.ppl.value,
        mean_kl=report.divergence.mean_kld.value,
        same_top=report.divergence.same_top.value,
    )


def record_quality(folder: Path, quality: Quality) -> None:
    """Write the figures into the folder's retnet.json and card.

    Raises:
        OutputError: they cannot be written.
    """
    record = read_manifest(folder).quantization
    assert record is not None
    update_record(folder, dataclasses.replace(record, quality=quality))
