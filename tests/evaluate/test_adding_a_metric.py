"""A new figure of every token is a row of `TOKEN_FIGURES`: it is scored, sorted and cut like the others.

To keep it, put the row into `distributions.py` and what a report shows of it into `Divergence` of
`evaluate/estimates.py`; `reports/perplexity_text.py` gives it a name in the table and in the JSON document.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from retnet_tools.distributions import TOKEN_FIGURES
from retnet_tools.evaluate import perplexity
from retnet_tools.evaluate.estimates import Divergence, Estimate, divergence, mean
from retnet_tools.evaluate.perplexity import measure_perplexity
from retnet_tools.evaluate.scored_text import ScoredText
from retnet_tools.evaluate.scoring import Windows, score_text
from retnet_tools.weights import Array
from tests.sources import MarkovLogits

VOCAB = 23
IDS = np.random.default_rng(4).integers(0, VOCAB, 300)


def total_variation(base: Array, model: Array, tokens: Array) -> Array:
    """sum_i |p_i - q_i| / 2."""
    return np.abs(np.exp(base) - np.exp(model)).sum(-1) / 2


@dataclass(frozen=True)
class WithVariation(Divergence):
    mean_variation: Estimate


def expected(source: MarkovLogits, baseline: MarkovLogits) -> list[float]:
    """The figure of every token but the first, worked out alone."""
    found = []
    for before in IDS[:-1]:
        p, q = (np.exp(s.table[before].astype(float)) for s in (baseline, source))
        found.append(float(np.abs(p / p.sum() - q / q.sum()).sum()) / 2)
    return found


def test_a_row_of_the_table_is_a_figure_of_every_token_and_its_mean_a_figure_of_the_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TOKEN_FIGURES, "variation", total_variation)
    source, baseline = MarkovLogits(VOCAB, seed=1), MarkovLogits(VOCAB, seed=2)
    tokens = score_text(source, IDS, Windows(16, 5), baseline=baseline, batch=3, all_positions=True).tokens
    alone = expected(source, baseline)
    np.testing.assert_allclose(tokens.variation, [alone[i - 1] for i in tokens.index], rtol=1e-12)

    monkeypatch.setattr(
        perplexity,
        "divergence",
        lambda tokens: WithVariation(**vars(divergence(tokens)), mean_variation=mean(tokens.variation)),
    )
    report = measure_perplexity(source, ScoredText(IDS, None), Windows(0), baseline=baseline)
    assert isinstance(report.divergence, WithVariation)
    assert report.divergence.mean_variation.value == pytest.approx(np.mean(alone))
