"""What quantization cost: a quantized folder measured against its float parent, and put down in it."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from retnet_tools.errors import UsageError
from retnet_tools.graph.contract import STEP_FILE
from retnet_tools.graph.export import ExportPlan
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.graph.quantization import Quality
from retnet_tools.quantize.card import update_record
from retnet_tools.reports.logits import ExportLogits, LogitsSource
from retnet_tools.reports.perplexity import measure_perplexity
from retnet_tools.reports.scored_text import read_tokens
from retnet_tools.reports.scoring import Progress
from retnet_tools.reports.windows import Windows

WINDOWS = Windows(512)
"""How the text is cut: the windows that `perplexity` uses where nothing else is said."""


def measure_quality(
    folder: Path,
    baseline: LogitsSource,
    name: str,
    text: str,
    *,
    limit: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Quality:
    """Measure a quantized folder against its float parent and write the figures into its retnet.json and card.

    Args:
        folder: what `quantize` wrote.
        baseline: the float model.
        name: of the text's file.
        text: one that the quantization has not seen, if the figures are to say anything about other texts.
        limit: tokens of it to take at most.

    Raises:
        UsageError: a folder of float weights, or a text that is too short.
        InputError: as `measure_perplexity`.
    """
    record = read_manifest(folder).quantization
    if record is None:
        raise UsageError(f"{folder} has float weights", "int8 or int4", "perplexity --against measures any two models")
    source = ExportLogits(folder, threads=threads)
    tokens = read_tokens(text, source, baseline, limit=limit)
    report = measure_perplexity(source, tokens, WINDOWS, baseline=baseline, progress=progress)
    assert report.baseline is not None
    assert report.divergence is not None
    quality = Quality(
        text=name,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        tokens=report.scored_tokens,
        perplexity=report.model.ppl.value,
        float_perplexity=report.baseline.ppl.value,
        mean_kl=report.divergence.mean_kld.value,
        same_top=report.divergence.same_top.value,
    )
    update_record(folder, dataclasses.replace(record, quality=quality))
    return quality


def check_measurable(plan: ExportPlan) -> None:
    """Check before anything is written that the folder of a plan can be measured.

    Raises:
        UsageError: float weights, or graphs that this runtime does not step.
    """
    if plan.quantization is None:
        raise UsageError(f"--text with {plan.dtype}", "int8 or int4", "perplexity --against measures any two models")
    if STEP_FILE not in plan.graphs:
        raise UsageError(f"--text for {', '.join(plan.graphs)}", "an export of --to onnx", "leave --text out")


def quality_text(quality: Quality) -> str:
    """The figures in a line."""
    change = quality.perplexity / quality.float_perplexity - 1
    return (
        f"  quality       PPL {quality.perplexity:.2f}, float {quality.float_perplexity:.2f} ({change:+.2%}); mean KLD "
        f"{quality.mean_kl:.2e}; same top p {quality.same_top:.2%} ({quality.tokens:,} tokens of {quality.text})"
    )
