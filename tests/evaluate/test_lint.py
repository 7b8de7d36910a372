"""Each check of the configuration and the tokenizer: a model that triggers it and one that does not."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from retnet_tools.config import HeadNorm, RetNetConfig
from retnet_tools.evaluate.lint import Finding, lint_config, lint_tokenizer, listing
from retnet_tools.paper import paper_decay
from tests.helpers import ABLATIONS, BASE, OTHER_LAYERS

HEADS = 32
MANY_HEADS = replace(
    BASE, num_heads=HEADS, key_dim=2 * HEADS, value_dim=HEADS, decay=paper_decay(HEADS), rotary_frequencies=(1.0,)
)
SIGNIFICAND_BITS = {"bfloat16": 8, "float16": 11, "float32": 24}


def found(config: RetNetConfig, *stored_types: str) -> dict[str, Finding]:
    return {finding.check: finding for finding in lint_config(config, stored_types or ("float32",))}


@pytest.mark.parametrize(
    "name", ["base", "tied", "torchscale_2023", "no_score_normalization", "no_head_norm", *OTHER_LAYERS]
)
def test_a_usual_model_has_no_findings(name: str) -> None:
    assert found(ABLATIONS[name]) == {}


@pytest.mark.parametrize("dtype", SIGNIFICAND_BITS)
def test_gammas_that_round_to_one_in_the_stored_type_are_named(dtype: str) -> None:
    finding = found(MANY_HEADS, dtype)["gamma-rounds"]
    # Below 1, numbers of p bits lie 2^-p apart, and a tie rounds to the even one, which is 1.
    half_step = Fraction(1, 2 ** (SIGNIFICAND_BITS[dtype] + 1))
    assert finding.where == tuple(str(h) for h in range(HEADS) if Fraction(1, 2 ** (5 + h)) <= half_step)
    assert finding.severity == "info"
    assert dtype in finding.message


def test_gammas_that_keep_their_difference_from_one_are_not() -> None:
    assert "gamma-rounds" not in found(BASE, "bfloat16", "float16", "float32")
    assert "gamma-rounds" not in found(MANY_HEADS, "float64")
    assert "gamma-rounds" not in found(replace(BASE, decay=(0.0,) * 4), "bfloat16")


def test_gamma_of_exactly_one_is_a_warning_that_names_the_heads() -> None:
    finding = found(replace(BASE, decay=(*BASE.decay[:3], 0.0)))["gamma-one"]
    assert (finding.severity, finding.where) == ("warning", ("3",))
    assert "gamma-equal" not in found(ABLATIONS["no_decay"])


def test_equal_gammas_are_a_warning_where_there_are_several_heads() -> None:
    assert found(ABLATIONS["one_gamma"])["gamma-equal"].severity == "warning"
    assert found(ABLATIONS["one_head"]) == {}


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (0, 1, 1, 2)])
def test_rotary_frequencies_that_do_not_decrease_are_a_warning(order: tuple[int, ...]) -> None:
    frequencies = tuple(BASE.rotary_frequencies[i] for i in order)
    assert found(replace(BASE, rotary_frequencies=frequencies))["rotary-order"].severity == "warning"


def test_each_head_may_start_anew_and_pairs_at_the_end_may_stand_still() -> None:
    own = BASE.rotary_frequencies
    assert found(replace(BASE, rotary_frequencies=own * 4)) == {}
    assert found(replace(BASE, rotary_frequencies=(*own[:2], 0.0, 0.0))) == {}
    for order in ((*own * 3, *own[::-1]), (0.0, *own[1:]), (own[0], 0.0, own[1], 0.0), (0.0,) * 4):
        assert list(found(replace(BASE, rotary_frequencies=order))) == ["rotary-order"]


def test_a_large_head_norm_epsilon_matters_only_under_a_score_clamp() -> None:
    large = ABLATIONS["large_head_norm_eps"]
    assert "run verify" in found(large)["score-clamp"].message
    assert "score-clamp" not in found(
        replace(large, score_normalization=replace(large.score_normalization, clamp="none"))
    )
    assert "score-clamp" not in found(BASE.with_head_norm_eps(1e-4))


def test_a_score_clamp_without_a_head_norm_is_a_warning() -> None:
    assert found(replace(BASE, head_norm=HeadNorm("none", 0.0)))["score-clamp"].severity == "warning"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Ids 0 to 99."""
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({str(i): i for i in range(100)}, unk_token="0")).save(str(path))
    return path


@pytest.mark.parametrize(
    ("vocab_size", "severity"), [(99, "warning"), (100, None), (228, None), (229, "warning"), (0, None)]
)
def test_vocabulary_and_tokenizer_are_compared(tokenizer: Path, vocab_size: int, severity: str | None) -> None:
    findings = list(lint_tokenizer(vocab_size, [tokenizer]))
    assert [(f.check, f.severity) for f in findings] == ([("vocabulary", severity)] if severity else [])


def test_padding_may_be_a_tenth_of_a_large_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({str(i): i for i in range(9000)}, unk_token="0")).save(str(path))
    assert list(lint_tokenizer(10_000, [path])) == []
    assert [f.severity for f in lint_tokenizer(10_001, [path])] == ["warning"]


def test_ids_count_not_entries(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a")).save(str(path))
    assert [f.severity for f in lint_tokenizer(7, [path])] == ["warning"]
    assert list(lint_tokenizer(8, [path])) == []


def test_tokenizers_that_are_broken_or_missing_are_warnings(tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    assert [(f.check, f.severity) for f in lint_tokenizer(61, [broken])] == [("tokenizer-unreadable", "warning")]
    broken.unlink()
    assert [(f.check, f.severity) for f in lint_tokenizer(61, [broken])] == [("tokenizer-missing", "warning")]


def test_no_tokenizer_is_no_finding() -> None:
    assert list(lint_tokenizer(61, [])) == []


def test_long_lists_are_cut() -> None:
    assert listing(["a", "b", "c"]) == "a, b, c"
    assert listing(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
