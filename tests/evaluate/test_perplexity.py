"""Reports against perplexities worked out row by row from the numpy model's logits, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from retnet_tools.config import RetNetConfig
from retnet_tools.evaluate.estimates import Estimate
from retnet_tools.evaluate.logits import ExportLogits
from retnet_tools.evaluate.perplexity import PerplexityReport, measure_perplexity, perplexity
from retnet_tools.evaluate.positions import Trend
from retnet_tools.evaluate.scored_text import ScoredText
from retnet_tools.evaluate.scoring import Windows
from retnet_tools.jobs.perplexity import PerplexityRequest, PerplexityResult
from retnet_tools.model.streaming import CheckpointLogits
from retnet_tools.reports.perplexity_text import estimate_text, perplexity_document, trend_text
from retnet_tools.weights import Array, WeightSource
from tests.exports import checkpoint, export
from tests.helpers import BASE, FLA, random_source, random_tokens
from tests.reference import reference_logits
from tests.sources import MarkovLogits

LENGTH, CONTEXT, STRIDE = 90, 24, 10


def text(seed: int = 3) -> ScoredText:
    sizes = np.random.default_rng(seed).integers(0, 6, LENGTH)
    return ScoredText(random_tokens(BASE, 1, LENGTH, seed)[0], sizes)


def scored(config: RetNetConfig, weights: WeightSource, ids: Array) -> Iterator[tuple[int, Array]]:
    """(index, log-probabilities before it) of every token that counts, each row run on its own from its start."""
    for start in range(0, LENGTH, STRIDE):
        row = ids[start : start + CONTEXT]
        logits = reference_logits(config, weights, row[None])[0]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for place in range(CONTEXT - STRIDE, CONTEXT):
            if start + place + 1 < LENGTH:
                yield start + place + 1, log_p[place]


@pytest.fixture(scope="module")
def expected() -> tuple[dict[int, Array], dict[int, Array]]:
    """Of a model and of a baseline: 60 to 90 tokens of log-probabilities by index."""
    ids = text().ids
    return tuple(dict(scored(BASE, random_source(BASE, seed), ids)) for seed in (1, 2))


def document(report: PerplexityReport) -> dict:
    return perplexity_document(PerplexityResult(PerplexityRequest("model", "text"), report))


def check(report: PerplexityReport, expected: tuple[dict[int, Array], dict[int, Array]], tolerance: float) -> None:
    ids, sizes = text().ids, text().sizes
    model, baseline = expected
    assert list(model) == list(range(CONTEXT - STRIDE + 1, LENGTH))
    nll = [-float(log_p[ids[i]]) for i, log_p in model.items()]
    base = [-float(log_p[ids[i]]) for i, log_p in baseline.items()]
    total = sum(int(sizes[i]) for i in model)
    kl = [float((np.exp(p) * (p - model[i])).sum()) for i, p in baseline.items()]
    assert (report.text_tokens, report.scored_tokens, report.scored_bytes) == (LENGTH, len(nll), total)
    assert (report.context, report.stride) == (CONTEXT, STRIDE)
    assert report.model.nll.value == pytest.approx(math.fsum(nll) / len(nll), abs=tolerance)
    assert report.model.ppl.value == pytest.approx(math.exp(math.fsum(nll) / len(nll)), rel=tolerance)
    assert report.model.bits_per_byte.value == pytest.approx(math.fsum(nll) / math.log(2) / total, rel=tolerance)
    assert report.baseline.ppl.value == pytest.approx(math.exp(math.fsum(base) / len(base)), rel=tolerance)
    assert report.divergence.mean_kld.value == pytest.approx(math.fsum(kl) / len(kl), rel=tolerance)
    assert report.divergence.max_kld == pytest.approx(max(kl), rel=tolerance)
    same = [model[i].argmax() == p.argmax() for i, p in baseline.items()]
    assert report.divergence.same_top.value == pytest.approx(sum(same) / len(same))


@pytest.mark.parametrize("batch", [1, 4])
def test_two_checkpoints(batch: int, expected: tuple[dict[int, Array], dict[int, Array]]) -> None:
    model, baseline = (CheckpointLogits(checkpoint(BASE, random_source(BASE, s)), "float64") for s in (1, 2))
    report = measure_perplexity(model, text(), Windows(CONTEXT, STRIDE), baseline=baseline, batch=batch)
    check(report, expected, 1e-9)


def test_two_exports(expected: tuple[dict[int, Array], dict[int, Array]], tmp_path: Path) -> None:
    model, baseline = (ExportLogits(export(BASE, random_source(BASE, s), tmp_path / str(s)), threads=1) for s in (1, 2))
    check(measure_perplexity(model, text(), Windows(CONTEXT, STRIDE), baseline=baseline), expected, 1e-4)


def test_a_checkpoint_and_its_export_are_the_same_model(tmp_path: Path) -> None:
    source = random_source(FLA, 1)
    model = ExportLogits(export(FLA, source, tmp_path / "out"), threads=1)
    report = measure_perplexity(model, text(), Windows(0), baseline=CheckpointLogits(checkpoint(FLA, source)))
    assert 0 < report.divergence.max_kld < 1e-9
    assert report.divergence.same_top.value == 1


def test_bits_per_byte_are_left_out_where_bytes_are_not_known() -> None:
    assert perplexity(np.ones(3), None).bits_per_byte is None
    assert perplexity(np.ones(3), np.zeros(3, np.int64)).bits_per_byte is None
    assert perplexity(np.ones(3), np.array([0, 2, 1])).bits_per_byte.value == pytest.approx(1 / math.log(2))


def test_the_document_holds_every_part_that_was_asked_for() -> None:
    model, baseline = MarkovLogits(61, seed=1), MarkovLogits(61, seed=2)
    plain = document(measure_perplexity(model, text(), Windows(8)))
    assert (plain["baseline"], plain["divergence"], plain["by_position"]) == (None, None, None)
    full = document(measure_perplexity(model, text(), Windows(8), baseline=baseline, positions=True))
    assert full["schema_version"] == 1
    assert full["divergence"]["kld_quantiles"]["1"] >= full["divergence"]["kld_quantiles"]["0.99"]
    assert [bin["last"] for bin in full["by_position"]["bins"]] == [1, 2, 4, 8]
    assert set(full["by_position"]["kld_trend"]) == {
        *("slope", "low", "high", "clusters", "mean", "unit", "verdict"),
    }


@pytest.mark.parametrize(
    ("estimate", "shown"),
    [
        (Estimate(36.4712, 0.4812), "36.47 ± 0.48"),
        (Estimate(1234567.0, 2345.0), "1,234,567 ± 2,345"),
        (Estimate(1.25e-6, 1.1e-8), "1.250e-06 ± 1.1e-08"),
        (Estimate(100.0, 0.0), "100"),
        (Estimate(5.5, math.nan), "5.5"),
        (Estimate(math.inf, math.inf), "inf ± inf"),
        (Estimate(0.0, 0.02), "0.000 ± 0.020"),
    ],
)
def test_numbers_are_shown_to_two_digits_of_their_error(estimate: Estimate, shown: str) -> None:
    assert estimate_text(estimate) == shown


@pytest.mark.parametrize(
    ("trend", "words"),
    [
        (Trend(1e-3, 5e-4, 1.5e-3, 20, 1e-2), "+1.00e-03 nats for each doubling (+10.0% of its mean; 95% interval"),
        (Trend(1e-3, 5e-4, 1.5e-3, 20, 1e-2), "+5.00e-04 to +1.50e-03): the error grows"),
        (Trend(-1e-3, -2e-3, -1e-4, 20, 1e-2), "): the error shrinks"),
        (Trend(0.0, -1e-4, 1e-4, 20, 1e-2), "): no trend seen"),
        (Trend(0.0, 0.0, 0.0, 20, 0.0), "no trend seen"),
        (Trend(1e-3, math.nan, math.nan, 3, 1e-2), "too short a text to tell a trend (3 pieces, at least 8 needed)"),
        (Trend(math.nan, math.nan, math.nan, 3, 1e-2), "all predictions have the same context"),
    ],
)
def test_the_trend_is_one_line(trend: Trend, words: str) -> None:
    assert words in trend_text(trend)
    assert "\n" not in trend_text(trend)
