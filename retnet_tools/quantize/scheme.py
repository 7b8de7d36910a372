"""A quantization scheme from the words of a user, checked against itself and against the model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

from retnet_tools.config import RetNetConfig
from retnet_tools.dtypes import ALIASES
from retnet_tools.errors import UsageError, did_you_mean
from retnet_tools.graph.quantization import (
    AccuracyLevel,
    BlockFormat,
    BlockSize,
    HalfScheme,
    HalfType,
    Scheme,
    TensorRule,
    WeightType,
)
from retnet_tools.weights import canonical_shapes

WEIGHT_ALIASES: dict[str, WeightType] = {"int8": "int8", "q8": "int8", "int4": "int4", "q4": "int4"}
HALF_TYPES: tuple[HalfType, ...] = ("float16", "bfloat16")
DEFAULT_BLOCK_SIZES: dict[WeightType, BlockSize] = {"int8": 128, "int4": 64}
"""8 bits lose little at any block size, and larger blocks are faster; 4 bits lose 8.0% of the shipped model's weights
(root of mean square) at 32, 8.8% at 64 and 9.5% at 128, for 5, 4.5 and 4.25 bits a weight."""
DEFAULT_ACCURACY_LEVEL: AccuracyLevel = 4
"""On the CPU the fast path, and with 8 bits the only usable one."""
DEFAULT_METHOD = "rtn"
TARGET_WORDS: dict[WeightType | HalfType, str] = {"int8": "int8", "int4": "int4", "float16": "fp16", "bfloat16": "bf16"}


def parse_target(text: str) -> WeightType | HalfType:
    """The type that a word after `--quantize` names, in any case.

    Raises:
        UsageError: a word that names none.
    """
    word = text.strip().lower()
    if word in WEIGHT_ALIASES:
        return WEIGHT_ALIASES[word]
    for half in HALF_TYPES:
        if ALIASES.get(word) == half:
            return half
    raise UsageError(
        f"--quantize {text!r}", f"one of {', '.join(TARGET_WORDS.values())}", did_you_mean(word, TARGET_WORDS.values())
    )


def parse_rule(text: str) -> TensorRule:
    """`REGEX=int8` or `REGEX=int4`.

    Raises:
        UsageError: anything else.
    """
    pattern, equals, word = text.rpartition("=")
    kind = WEIGHT_ALIASES.get(word.strip().lower())
    if not equals or not pattern or kind is None:
        raise UsageError(f"--tensor-type {text!r}", "REGEX=int8 or REGEX=int4", "a tensor that stays float: --exclude")
    return TensorRule(pattern, kind)


@dataclass(frozen=True)
class SchemeOptions:
    """The options of `quantize`, as given; None takes the default.

    Attributes:
        tensor_types: `REGEX=TYPE` each.
    """

    block_size: int | None = None
    symmetric: bool | None = None
    accuracy_level: int | None = None
    method: str | None = None
    exclude: tuple[str, ...] = ()
    tensor_types: tuple[str, ...] = ()


NO_OPTIONS = SchemeOptions()


def make_scheme(kind: WeightType, options: SchemeOptions = NO_OPTIONS, *, ops: str) -> Scheme:
    """A scheme with its defaults filled in.

    Args:
        ops: the operator set of the graphs.

    Raises:
        UsageError: a value that is not offered, a pattern that is no regular expression, an accuracy level for
            standard operators.
    """
    if options.accuracy_level is not None and ops != "fused":
        raise UsageError(
            f"--accuracy-level with {ops} operators",
            "fused operators",
            "ONNX Runtime's session option session.qdq_matmulnbits_accuracy_level sets it there",
        )
    block_size, level = options.block_size, options.accuracy_level
    default_level = DEFAULT_ACCURACY_LEVEL if ops == "fused" else None
    return Scheme(
        type=kind,
        block_size=DEFAULT_BLOCK_SIZES[kind] if block_size is None else cast(BlockSize, block_size),
        symmetric=options.symmetric is not False,
        accuracy_level=default_level if level is None else cast(AccuracyLevel, level),
        method=options.method or DEFAULT_METHOD,
        exclude=options.exclude,
        tensor_types=tuple(map(parse_rule, options.tensor_types)),
    )


def matrix_names(config: RetNetConfig) -> list[str]:
    """Canonical names of the weights of linear layers, the embedding and the output head, in storage order."""
    return [name for name, shape in canonical_shapes(config).items() if len(shape) == 2]


def matrix_formats(scheme: Scheme, config: RetNetConfig) -> dict[str, BlockFormat | None]:
    """The format of every matrix of a model by canonical name, in storage order; None where it stays float.

    Norms, biases and tables, which are no matrices, stay float.

    Raises:
        UsageError: a pattern that is found in no name, or a scheme that quantizes nothing.
    """
    names = matrix_names(config)
    for pattern in (*scheme.exclude, *(rule.pattern for rule in scheme.tensor_types)):
        if not any(re.search(pattern, name) for name in names):
            raise UsageError(
                f"pattern {pattern!r} is found in no matrix's name",
                f"names such as {names[1]!r} and {names[-1]!r}",
                "retnet-tools inspect shows the model",
            )
    formats = {name: scheme.format_of(name) for name in names}
    if not any(formats.values()):
        raise UsageError("a scheme that excludes every matrix", "one that quantizes something")
    return formats


def scheme_text(scheme: Scheme | HalfScheme) -> str:
    """A scheme in one line."""
    if isinstance(scheme, HalfScheme):
        return f"{scheme.type} weights and activations, {scheme.method}"
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    level = "" if scheme.accuracy_level is None else f", accuracy level {scheme.accuracy_level}"
    rules = [f"{rule.type} where {rule.pattern}" for rule in scheme.tensor_types]
    rules += [f"float where {pattern}" for pattern in scheme.exclude]
    return ", ".join([f"{scheme.type} in blocks of {scheme.block_size}, {kind}, {scheme.method}{level}", *rules])
