"""A text run in rows, groups and blocks gives each token the figures that it has alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from retnet_tools.errors import InputError, UsageError
from retnet_tools.evaluate.positions import by_position
from retnet_tools.evaluate.scoring import Windows, score_text
from tests.sources import MarkovLogits

VOCAB = 23
IDS = np.random.default_rng(9).integers(0, VOCAB, 501)


def nll_of(source: MarkovLogits, index: int) -> float:
    """-ln p of a token of the text after the one before it."""
    logits = [float(z) for z in source.table[IDS[index - 1]]]
    return math.log(math.fsum(map(math.exp, logits))) - logits[IDS[index]]


@pytest.mark.parametrize(
    ("windows", "batch"), [(Windows(16), 1), (Windows(16, 5), 4), (Windows(300, 7), 3), (Windows(0), 9)]
)
def test_every_scored_token_has_its_own_figure(windows: Windows, batch: int) -> None:
    source = MarkovLogits(VOCAB)
    scoring = score_text(source, IDS, windows, batch=batch)
    context, stride = windows.sizes(len(IDS))
    tokens = scoring.tokens
    assert tokens.scored.all()
    assert tokens.index.tolist() == list(range(context - stride + 1, len(IDS)))
    np.testing.assert_allclose(tokens.nll, [nll_of(source, i) for i in tokens.index], rtol=1e-12)
    assert scoring.rows == len(list(windows.rows(len(IDS))))
    assert scoring.fed == sum(row.length for row in windows.rows(len(IDS)))
    assert scoring.seconds > 0


def test_rows_are_fed_from_their_own_start() -> None:
    source = MarkovLogits(VOCAB)
    score_text(source, IDS, Windows(16, 5), batch=2)
    for k, row in enumerate(row for group in source.rows for row in group):
        real = IDS[5 * k : 5 * k + 16][: len(IDS) - 1 - 5 * k]
        assert row[: len(real)].tolist() == real.tolist()


def test_the_last_token_of_the_text_is_predicted_and_never_fed() -> None:
    source = MarkovLogits(VOCAB)
    ids = np.concatenate([np.zeros(40, np.int64), [VOCAB - 1]])
    assert score_text(source, ids, Windows(8)).tokens.index[-1] == 40
    assert all((rows < VOCAB - 1).all() for rows in source.rows)


def test_a_baseline_is_compared_token_by_token() -> None:
    source, baseline = MarkovLogits(VOCAB, seed=1), MarkovLogits(VOCAB, seed=2)
    tokens = score_text(source, IDS, Windows(16), baseline=baseline, batch=3).tokens
    for n in (0, 100, len(tokens.index) - 1):
        p, q = (np.exp(s.table[IDS[tokens.index[n] - 1]].astype(float)) for s in (baseline, source))
        p, q = p / p.sum(), q / q.sum()
        assert tokens.kl[n] == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-12)
        assert tokens.same_top[n] == (p.argmax() == q.argmax())
    np.testing.assert_allclose(tokens.baseline_nll, [nll_of(baseline, i) for i in tokens.index], rtol=1e-12)
    np.testing.assert_allclose(tokens.nll, [nll_of(source, i) for i in tokens.index], rtol=1e-12)


def test_all_positions_adds_the_context_of_rows_that_do_not_overlap_and_changes_no_score() -> None:
    source = MarkovLogits(VOCAB)
    plain = score_text(source, IDS, Windows(16)).tokens
    more = score_text(source, IDS, Windows(16), all_positions=True).tokens
    assert more[more.scored].index.tolist() == plain.index.tolist()
    np.testing.assert_array_equal(more[more.scored].nll, plain.nll)
    apart = more[more.apart]
    assert len(set(apart.index.tolist())) == len(apart.index)
    assert {int(c) for c in apart.context} == set(range(1, 17))
    np.testing.assert_allclose(apart.nll, [nll_of(source, i) for i in apart.index], rtol=1e-12)


def test_an_error_that_grows_along_the_row_is_told_from_one_that_does_not() -> None:
    ids = np.random.default_rng(3).integers(0, VOCAB, 6000)
    verdicts = []
    for noise in (lambda place: 0.01 + place * 0.0, lambda place: 0.01 * np.sqrt(1 + place / 50)):
        source = MarkovLogits(VOCAB, noise=noise)
        tokens = score_text(source, ids, Windows(128), baseline=MarkovLogits(VOCAB), all_positions=True).tokens
        verdicts.append(by_position(tokens).trend.verdict)
    assert verdicts == ["no trend seen", "grows"]


def test_a_block_of_logits_is_bounded_whatever_the_text_and_the_vocabulary() -> None:
    source = MarkovLogits(1500)
    score_text(source, np.arange(1400), Windows(0))
    assert max(shape[1] for shape in source.shapes) == 256
    source.shapes.clear()
    score_text(source, np.tile(np.arange(1400), 4), Windows(200), batch=40)
    assert len(source.rows[-1]) > 1
    assert max(np.prod(shape) for shape in source.shapes) <= 1 << 24


def test_progress_ends_with_all_tokens() -> None:
    seen: list[tuple[str, int, int]] = []
    scoring = score_text(MarkovLogits(VOCAB), IDS, Windows(16), progress=lambda *step: seen.append(step))
    assert seen[-1][1:] == (scoring.fed, scoring.fed)
    assert float(seen[-1][0].rpartition(" ")[2]) == pytest.approx(scoring.tokens.nll.mean(), abs=1e-4)


def test_logits_that_are_not_finite_are_refused_with_their_place() -> None:
    source = MarkovLogits(VOCAB, name="broken")
    source.table[7, 3] = np.nan
    first = next(i for i in range(9, len(IDS)) if IDS[i - 1] == 7)
    with pytest.raises(InputError, match=f"broken gives logits that are not finite before token {first} of the text"):
        score_text(source, IDS, Windows(16), batch=1)
    with pytest.raises(InputError, match="broken"):
        score_text(MarkovLogits(VOCAB), IDS, Windows(16), baseline=source)


def test_a_batch_below_1_is_refused() -> None:
    with pytest.raises(UsageError, match="--batch 0"):
        score_text(MarkovLogits(VOCAB), IDS, Windows(16), batch=0)
