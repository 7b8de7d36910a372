"""Rows say what was seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from retnet_tools.bench.options import Case
from retnet_tools.bench.rows import Repetition, Sample, make_row, off_median, with_measured_memory
from tests.bench.reports import TRAFFIC, observed, row, subject

RATES = 2 * 10 / (10 * 0.02 * np.array([0.9, 1.0, 1.1]))


def sample(*seconds: float, **changes: object) -> Repetition:
    return Repetition(replace(Sample(seconds, None, None, "cpu", None), **changes), 1e9, None)


def test_a_decode_row_has_means_percentiles_and_the_share_of_the_limit() -> None:
    found = row("retnet", Case("decode", 10, 100, 2), seconds=0.02)
    assert found.repetitions == pytest.approx(tuple(RATES))
    assert found.tokens_per_second == pytest.approx(RATES.mean())
    assert found.tokens_per_second_std == pytest.approx(RATES.std(ddof=1))
    assert found.ms_per_token_p50 == pytest.approx(20)
    assert found.ms_per_token_p99 == pytest.approx(22)
    assert found.ms_medians == pytest.approx((18, 20, 22))
    assert found.bytes_per_token == TRAFFIC.weight_bytes / 2 + 2 * TRAFFIC.fixed_state + 61 * 4
    assert found.bandwidths == (1e9, 2e9, 3e9)
    assert found.read_bandwidth == pytest.approx(2e9)
    shares = found.bytes_per_token * RATES / np.array([1e9, 2e9, 3e9])
    assert found.floor_share == pytest.approx(np.median(shares))
    assert (found.ms_to_first_token, found.product_share, found.retnet_speedup) == (None, None, None)
    assert (found.chunk_size, found.product_rates, found.state_buffers) == (None, (), 1)
    assert found.peak_resident_bytes == 300_000_000
    assert found.parameters == TRAFFIC.parameters


def test_percentiles_are_of_all_steps() -> None:
    steps = sample(*(n / 1000 for n in range(1, 102)))
    found = make_row(subject("retnet"), Case("decode", 101, 0, 1), 1, {0: steps}, None)
    assert (found.ms_per_token_p50, found.ms_per_token_p99) == (pytest.approx(51), pytest.approx(100))


def test_the_share_of_the_limit_is_of_the_median_step() -> None:
    decode = make_row(subject("retnet"), Case("decode", 3, 0, 4), 1, {0: sample(0.02, 0.02, 9.0)}, None)
    assert decode.floor_share == pytest.approx(4 * decode.bytes_per_token / 0.02 / 1e9)
    prompt = make_row(subject("retnet"), Case("prefill", 100, 0, 4), 1, {0: sample(0.02)}, None)
    assert prompt.floor_share == pytest.approx(100 * 4 * prompt.bytes_per_token / 0.02 / 1e9)


def test_a_prompt_row_has_the_time_to_the_first_token_and_the_share_of_products() -> None:
    found = row("retnet", Case("prefill", 256, 0, 1), seconds=0.5)
    assert found.ms_to_first_token == pytest.approx(500)
    assert found.ms_per_token_p50 == pytest.approx(500 / 256)
    assert found.flops_per_token == TRAFFIC.prefill_flops(256, 0)
    assert found.product_rates == (1e11, 2e11, 1e11)
    assert found.product_rate == 1e11
    shares = found.flops_per_token * np.array(found.repetitions) / np.array(found.product_rates)
    assert found.product_share == pytest.approx(np.median(shares))
    assert found.bytes_per_token == TRAFFIC.prefill_bytes(1, 256, 0)
    assert (found.chunk_size, found.state_buffers) == (128, 2)


def test_an_alternative_is_compared_in_the_repetitions_that_both_ran() -> None:
    test = Case("decode", 10, 0, 1)
    assert row("torch", test, seconds=0.03, retnet=0.01).retnet_speedup == pytest.approx(3)
    ours, theirs = dict(observed(0.01, test)), dict(observed(0.03, test))
    ours[0], theirs[2] = sample(*[1.0] * 10), sample(*[9.0] * 10)
    del ours[2], theirs[0]
    assert make_row(subject("torch"), test, 1, theirs, ours).retnet_speedup == pytest.approx(3)
    assert make_row(subject("torch"), test, 1, theirs, {}).retnet_speedup is None


def test_what_is_off_by_more_than_a_tenth_of_the_median_deviates_either_way() -> None:
    assert off_median([1.0, 1.09, 0.91]) == []
    assert off_median([1.0, 0.89, 1.0, 1.11, 1.0]) == [1, 3]
    assert off_median([0.05, 0.05, 0.07], least=0.03) == []
    assert off_median([0.05, 0.05, 0.09], least=0.03) == [2]


def test_one_repetition_has_no_deviation() -> None:
    assert row("retnet", Case("decode", 4, 0, 1), repetitions=1).tokens_per_second_std is None


def test_a_row_has_the_device_and_the_graphs_that_were_really_used() -> None:
    test = Case("decode", 1, 0, 1)

    def of(*repetitions: Repetition):
        return make_row(subject("retnet"), test, 1, dict(enumerate(repetitions)), None)

    captured, eager = (sample(0.1, device="cuda", cuda_graph=graph, device_bytes=7) for graph in (True, False))
    assert (of(captured).device, of(captured).cuda_graph, of(captured).device_bytes) == ("cuda", True, 7)
    assert of(captured, eager).cuda_graph is False
    assert (of(sample(0.1)).device, of(sample(0.1)).cuda_graph) == ("cpu", None)


def test_memory_of_a_sequence_is_the_slope_over_batches() -> None:
    def of(name: str, depth: int, batch: int, memory: int):
        test = Case("decode", 4, depth, batch)
        return make_row(subject(name), test, 2, observed(0.01, test, memory=memory), None)

    rows = [of("retnet", 0, batch, 10**9 + batch * 5_000_000) for batch in (1, 2, 8)]
    rows += [of("retnet", 100, 1, 10**9), of("torch", 0, 1, 10**9), of("torch", 0, 4, 10**9)]
    slopes = [row.memory_per_sequence for row in with_measured_memory(rows)]
    assert slopes == [pytest.approx(5e6)] * 3 + [None] + [pytest.approx(0, abs=1)] * 2
