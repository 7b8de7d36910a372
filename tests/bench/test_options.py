"""Every combination is a test, named as llama-bench names it; what cannot be measured is refused."""

from __future__ import annotations

import pytest

from retnet_tools.bench.options import BenchOptions, Case
from retnet_tools.errors import UsageError
from retnet_tools.graph.contract import MAX_POSITION


def test_every_combination_is_a_test() -> None:
    options = BenchOptions(prompts=(512, 2048), tokens=(128,), depths=(0, 8192), batches=(1, 8))
    assert [test.name for test in options.tests("prefill")] == [
        *("pp512", "pp512", "pp512 @ d8192", "pp512 @ d8192"),
        *("pp2048", "pp2048", "pp2048 @ d8192", "pp2048 @ d8192"),
    ]
    assert options.tests("decode") == [Case("decode", 128, depth, batch) for depth in (0, 8192) for batch in (1, 8)]
    assert options.room == 8192 + 2048 + 3


def test_zero_leaves_a_kind_out_and_repeated_values_count_once() -> None:
    options = BenchOptions(prompts=(0,), tokens=(4, 4))
    assert options.tests("prefill") == []
    assert [test.name for test in options.tests("decode")] == ["tg4"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": (-1,)}, "-p -1"),
        ({"tokens": ()}, "-n nothing"),
        ({"batches": (1, 0)}, "-b 0"),
        ({"repetitions": 0}, "-r 0"),
        ({"against": ("tranformer",)}, "did you mean 'transformer'"),
        ({"depths": (MAX_POSITION,)}, f"at most {MAX_POSITION}"),
        ({"prompts": (0,), "tokens": (0,)}, "nothing to measure"),
        ({"chunk_size": 0}, "--chunk-size 0"),
        ({"flat": True, "repetitions": 2}, "at least 3 repetitions"),
        ({"flat": True, "tokens": (0,)}, "-n 0 with --flat"),
    ],
)
def test_what_cannot_be_measured_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BenchOptions(**wrong)


def test_copies_are_models_on_the_disk() -> None:
    assert BenchOptions().copies == 1
    assert BenchOptions(against=("torch", "transformer", "transformer", "transformer-gqa")).copies == 3
