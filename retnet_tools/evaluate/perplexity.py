"""How well a model predicts a text, and how far it is from a baseline on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from retnet_tools.evaluate.estimates import Divergence, Estimate, divergence, mean, ratio
from retnet_tools.evaluate.logits import LogitsSource
from retnet_tools.evaluate.positions import ByPosition, by_position
from retnet_tools.evaluate.scored_text import ScoredText
from retnet_tools.evaluate.scoring import DEFAULT_BATCH, Windows, score_text
from retnet_tools.progress import Progress, no_progress
from retnet_tools.weights import Array


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts the scored tokens.

    Attributes:
        nll: mean of -ln p(token), nats a token.
        ppl: e^nll, with the error PPL times that of nll (delta method), as llama-perplexity has it.
        bits_per_byte: sum of -log2 p(token) over the UTF-8 bytes of the scored tokens (see `ScoredText.sizes`); None
            where these are not known, or where the tokens have no bytes.
    """

    nll: Estimate
    ppl: Estimate
    bits_per_byte: Estimate | None


@dataclass(frozen=True)
class PerplexityReport:
    """What `measure_perplexity` found.

    Attributes:
        name, description: of the model.
        baseline_name, baseline_description: of the baseline, or None.
        context, stride: as they were used.
        rows: how many were fed.
        text_tokens: in the text, a start token included.
        scored_tokens: of these.
        scored_bytes: UTF-8 bytes of the scored tokens, or None.
        by_position: None unless asked for.
        tokens_per_second: tokens fed to the model a second of its own time, the baseline and the statistics aside.
    """

    name: str
    description: str
    baseline_name: str | None
    baseline_description: str | None
    context: int
    stride: int
    rows: int
    text_tokens: int
    scored_tokens: int
    scored_bytes: int | None
    model: Perplexity
    baseline: Perplexity | None
    divergence: Divergence | None
    by_position: ByPosition | None
    tokens_per_second: float
    notes: tuple[str, ...]


def measure_perplexity(
    source: LogitsSource,
    text: ScoredText,
    windows: Windows,
    *,
    baseline: LogitsSource | None = None,
    batch: int = DEFAULT_BATCH,
    positions: bool = False,
    progress: Progress = no_progress,
) -> PerplexityReport:
    """Score a text with a model, and with a baseline at the same time; see `score_text` for memory and errors.

    Args:
        windows: how the text is cut, and what is scored.
        batch: rows fed side by side.
        positions: also look at figures by position.
    """
    scoring = score_text(
        source, text.ids, windows, baseline=baseline, batch=batch, all_positions=positions, progress=progress
    )
    tokens = scoring.tokens[scoring.tokens.scored]
    sizes = None if text.sizes is None else text.sizes[tokens.index]
    context, stride = windows.sizes(len(text.ids))
    return PerplexityReport(
        name=source.name,
        description=source.description,
        baseline_name=None if baseline is None else baseline.name,
        baseline_description=None if baseline is None else baseline.description,
        context=context,
        stride=stride,
        rows=scoring.rows,
        text_tokens=len(text.ids),
        scored_tokens=len(tokens.nll),
        scored_bytes=None if sizes is None else int(sizes.sum()),
        model=perplexity(tokens.nll, sizes),
        baseline=None if baseline is None else perplexity(tokens.baseline_nll, sizes),
        divergence=None if baseline is None else divergence(tokens),
        by_position=by_position(scoring.tokens) if positions else None,
        tokens_per_second=scoring.fed / scoring.seconds,
        notes=(*source.notes, *(baseline.notes if baseline else ()), *text.notes),
    )


def perplexity(nll: Array, sizes: Array | None) -> Perplexity:
    """The figures of tokens with -ln p `[N]` nats and sizes `[N]` bytes."""
    average = mean(nll)
    bits = ratio(nll / math.log(2), sizes) if sizes is not None and sizes.any() else None
    return Perplexity(average, average.exp(), bits)
