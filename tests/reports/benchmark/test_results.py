"""Rows say what was seen, and a document is read back as it was."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from retnet_tools.fields import from_json
from retnet_tools.reports.benchmark.options import Case
from retnet_tools.reports.benchmark.results import BenchRow, Observed, benchmark_document
from tests.reports.benchmark.reports import GRID, TRAFFIC, report, row

RATES = 2 * 10 / (10 * 0.02 * np.array([0.9, 1.0, 1.1]))


def test_a_decode_row_has_means_percentiles_and_the_share_of_the_limit() -> None:
    found = row("retnet", Case("decode", 10, 100, 2), seconds=0.02)
    assert found.repetitions == pytest.approx(tuple(RATES))
    assert found.tokens_per_second == pytest.approx(RATES.mean())
    assert found.tokens_per_second_std == pytest.approx(RATES.std(ddof=1))
    assert found.ms_per_token_p50 == pytest.approx(20)
    assert found.ms_per_token_p99 == pytest.approx(22)
    assert found.bytes_per_token == TRAFFIC.weight_bytes / 2 + 2 * TRAFFIC.fixed_state + 61 * 4
    assert found.read_bandwidth == pytest.approx(2e9)
    shares = found.bytes_per_token * RATES / np.array([1e9, 2e9, 3e9])
    assert found.floor_share == pytest.approx(np.median(shares))
    assert (found.ms_to_first_token, found.product_share, found.retnet_speedup) == (None, None, None)
    assert found.peak_resident_bytes == 300_000_000
    assert found.parameters == TRAFFIC.parameters


def test_the_share_of_the_limit_is_of_the_median_step() -> None:
    seen = Observed(seconds=[(0.02, 0.02, 9.0)], peaks=[None], device_bytes=[None], bandwidths=[1e9], product_rates=[])
    assert seen.floor_share(Case("decode", 3, 0, 4), 1e6) == pytest.approx(4 * 1e6 / 0.02 / 1e9)
    assert seen.floor_share(Case("prefill", 100, 0, 4), 1e6) == pytest.approx(100 * 4 * 1e6 / 0.02 / 1e9)


def test_a_prompt_row_has_the_time_to_the_first_token_and_the_share_of_products() -> None:
    found = row("retnet", Case("prefill", 256, 0, 1), seconds=0.5)
    assert found.ms_to_first_token == pytest.approx(500)
    assert found.ms_per_token_p50 == pytest.approx(500 / 256)
    assert found.flops_per_token == TRAFFIC.linear_flops + TRAFFIC.mixing_flops
    assert found.product_rate == 2e11
    assert found.product_share == pytest.approx(found.flops_per_token * found.tokens_per_second / 2e11)
    assert found.bytes_per_token == TRAFFIC.prefill_bytes(1, 256, 0)


def test_an_alternative_is_compared_repetition_by_repetition() -> None:
    assert row("torch", Case("decode", 10, 0, 1), seconds=0.03, retnet=0.01).retnet_speedup == pytest.approx(3)


def test_one_repetition_has_no_deviation() -> None:
    assert row("retnet", Case("decode", 4, 0, 1), repetitions=1).tokens_per_second_std is None


def test_the_document_is_json_and_its_rows_are_read_back() -> None:
    document = json.loads(json.dumps(benchmark_document(report(GRID, flat=True, profile=True))))
    assert document["schema_version"] == 2
    assert [from_json(BenchRow, data) for data in document["rows"]] == GRID
    assert document["skipped"][0]["reason"].startswith("its states need")
    assert document["flat"]["positions"][3]["position"] == 1_000_000
    assert document["profile"][0] == asdict(report([], profile=True).profile[0])
    assert document["libraries"]["numpy"] == np.__version__
