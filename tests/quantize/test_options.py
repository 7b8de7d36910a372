"""Options from words, and their schemes: defaults, and one clear refusal for each word that does not fit."""

from __future__ import annotations

import math
import re

import pytest

from retnet_tools.errors import UsageError
from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.graph.quantization import Scheme, TensorRule
from retnet_tools.quantize.options import QuantizeOptions, matrix_formats, options_of, parse_rule, parse_type
from retnet_tools.weights import canonical_shapes
from tests.helpers import ABLATIONS, BASE, OTHER_LAYERS


@pytest.mark.parametrize(
    ("word", "target"),
    [("int8", "int8"), ("Q8", "int8"), ("q4", "int4"), (" int4 ", "int4"), ("f16", "float16"), ("bf16", "bfloat16")],
)
def test_words_for_types(word: str, target: str) -> None:
    assert parse_type(word) == target


@pytest.mark.parametrize("word", ["fp32", "int3", "", "float"])
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"--quantize {word!r}; expected one of int8, int4, fp16, bf16")):
        parse_type(word)


def test_defaults() -> None:
    assert QuantizeOptions("int8").scheme("fused") == Scheme(
        "int8", 128, symmetric=True, accuracy_level=4, method="rtn"
    )
    assert QuantizeOptions("int4").scheme("fused").block_size == 64
    assert QuantizeOptions("int4").scheme("standard").accuracy_level is None


def test_what_is_given_is_kept() -> None:
    options = QuantizeOptions(
        "int4", 32, symmetric=False, accuracy_level=0, exclude=("lm_head",), tensor_types=("a=b=q8",)
    )
    scheme = options.scheme("fused")
    rules = (TensorRule("a=b", "int8"),)
    assert scheme == Scheme("int4", 32, False, accuracy_level=0, exclude=("lm_head",), tensor_types=rules)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 48}, "block_size is 48; expected one of 32, 64, 128"),
        ({"block_size": 0}, "block_size is 0; expected one of 32, 64, 128"),
        ({"accuracy_level": 2}, "accuracy_level is 2; expected one of 0, 1, 4"),
        ({"exclude": ("(",)}, "pattern '('"),
        ({"tensor_types": ("q_proj",)}, "--tensor-type 'q_proj'; expected REGEX=int8 or REGEX=int4"),
        ({"tensor_types": ("q_proj=float",)}, "stays float: --exclude"),
        ({"tensor_types": ("=int8",)}, "--tensor-type '=int8'"),
    ],
)
def test_values_that_are_not_offered_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        QuantizeOptions("int4", **arguments).scheme("fused")


def test_an_accuracy_level_for_standard_operators_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--accuracy-level with standard operators.*qdq_matmulnbits_accuracy_level"):
        QuantizeOptions("int4", accuracy_level=4).scheme("standard")


@pytest.mark.parametrize("name", ["base", "tied", "stack", "torchscale_2023", "channel_head_norm", *OTHER_LAYERS])
def test_every_matrix_and_nothing_else_has_a_format(name: str) -> None:
    formats = matrix_formats(QuantizeOptions("int4").scheme("fused"), ABLATIONS[name])
    shapes = canonical_shapes(ABLATIONS[name])
    assert list(formats) == [tensor for tensor, shape in shapes.items() if len(shape) == 2]
    assert set(formats.values()) == {BlockFormat(4, 64, True)}


def test_patterns_choose_among_the_matrices() -> None:
    options = QuantizeOptions("int4", exclude=("embedding",), tensor_types=(r"layers\.1\..*\.[qk]_proj=int8",))
    scheme = options.scheme("fused")
    formats = matrix_formats(scheme, BASE)
    assert [name for name, format in formats.items() if format is None] == ["embedding.weight"]
    assert [name for name, format in formats.items() if format and format.bits == 8] == [
        "layers.1.retention.q_proj.weight",
        "layers.1.retention.k_proj.weight",
    ]


@pytest.mark.parametrize("words", [{"exclude": ("final_norm",)}, {"tensor_types": (r"layers\.7\.=int8",)}])
def test_a_pattern_that_finds_nothing_is_refused(words: dict) -> None:
    with pytest.raises(UsageError, match="is found in no matrix's name"):
        matrix_formats(QuantizeOptions("int4", **words).scheme("fused"), BASE)


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(UsageError, match="excludes every matrix"):
        matrix_formats(QuantizeOptions("int4", exclude=("weight",)).scheme("fused"), BASE)


def test_a_rule_keeps_the_equals_signs_of_its_pattern() -> None:
    assert parse_rule("a=b=int4") == TensorRule("a=b", "int4")


@pytest.mark.parametrize("bits", [0.0, -1.0, math.inf, math.nan])
def test_bits_out_of_range_are_refused(bits: float) -> None:
    with pytest.raises(UsageError, match=r"--target-bits .*; expected a positive number"):
        QuantizeOptions("int4", target_bits=bits)


def test_size_and_bits_together_are_refused() -> None:
    with pytest.raises(UsageError, match="--target-size and --target-bits together; expected one of them"):
        QuantizeOptions("int4", target_size=10, target_bits=5.0)


@pytest.mark.parametrize(
    "given", [{"block_size": 32}, {"symmetric": False}, {"accuracy_level": 0}, {"exclude": ("a",)}, {"seed": 0}]
)
def test_options_without_a_type_are_refused(given: dict) -> None:
    with pytest.raises(UsageError, match="options of a quantization scheme without --quantize; expected"):
        options_of(None, **given)


def test_nothing_asked_for_is_nothing() -> None:
    assert options_of(None, block_size=None, exclude=(), keep_merged=False) is None
    assert options_of("q4", seed=None) == QuantizeOptions("int4")
