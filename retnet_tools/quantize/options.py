"""What a user asks of quantization, checked against itself, and what follows from it for the matrices of a model."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retnet_tools.config import RetNetConfig
from retnet_tools.dtypes import ALIASES
from retnet_tools.errors import UsageError, did_you_mean
from retnet_tools.fields import check_types
from retnet_tools.graph.code_types import CODE_TYPES, HALF_TYPES, BlockFormat, BlockSize
from retnet_tools.graph.quantization import AccuracyLevel, HalfScheme, Scheme, TensorRule
from retnet_tools.weights import canonical_shapes

DEFAULT_ACCURACY_LEVEL: AccuracyLevel = 4
"""On the CPU the fast path, and with 8 bits the only usable one."""
SEQUENCE = 512
"""Calibration tokens that follow one another in the text."""
DEFAULT_TOKENS = 128 * SEQUENCE


@dataclass(frozen=True)
class QuantizeOptions:
    """The options of `quantize`, as given; None takes the default.

    Attributes:
        type: a word for a type of weights, such as int8, q4 or fp16; here under the name that retnet.json has.
        block_size: 32, 64 or 128 weights that share a scale.
        symmetric: no zero points.
        accuracy_level: of products on the CPU, with fused operators: 0, 1 or 4.
        method: rtn or gptq.
        exclude: patterns of matrices that stay float.
        tensor_types: `REGEX=TYPE` each, for matrices of another type.
        calibration: a text in UTF-8, for a calibrated method and to choose types on.
        calibration_tokens: how many of its tokens to draw, at most; in sequences of `SEQUENCE`.
        seed: of the draw.
        target_size: bytes of weights.data to keep to, by types chosen by sensitivity.
        target_bits: the same as bits a weight, on average over all matrices, scales and zero points included.
        keep_merged: with a target: matrices that the graph keeps as one get one type.

    Raises:
        UsageError: a word that names no type, options that do not go together, values out of range.
    """

    type: str
    block_size: BlockSize | None = None
    symmetric: bool | None = None
    accuracy_level: AccuracyLevel | None = None
    method: str | None = None
    exclude: tuple[str, ...] = ()
    tensor_types: tuple[str, ...] = ()
    calibration: Path | None = None
    calibration_tokens: int | None = None
    seed: int | None = None
    target_size: int | None = None
    target_bits: float | None = None
    keep_merged: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "type", parse_type(self.type))
        if self.calibration is None and (self.calibration_tokens, self.seed) != (None, None):
            raise UsageError("--calibration-tokens or --seed without a text", "--calibration FILE")
        if self.calibration_tokens is not None and self.calibration_tokens < SEQUENCE:
            found = f"{self.calibration_tokens} tokens to calibrate on"
            raise UsageError(found, f"at least {SEQUENCE}, one sequence")
        if self.target_size is not None and self.target_bits is not None:
            raise UsageError("--target-size and --target-bits together", "one of them")
        if self.target_bits is not None and not 0 < self.target_bits < math.inf:
            raise UsageError(f"--target-bits {self.target_bits}", "a positive number")
        if self.has_target and self.calibration is None:
            raise UsageError(
                "a target for size or bits without a text",
                "--calibration FILE",
                "types are chosen by how much predictions on it suffer",
            )
        if self.keep_merged and not self.has_target:
            raise UsageError("--keep-merged without a target", "--target-size or --target-bits")
        if self.is_half and self.calibration is not None:
            raise UsageError(f"a text to calibrate on with {self.type} weights", f"--quantize {_code_words()}")
        if self.is_half and _asks_for_something(vars(self)):
            raise UsageError(f"options of a quantization scheme with {self.word}", "none of them")
        check_types(self)
        if not self.is_half:
            self._scheme(None)

    @property
    def is_half(self) -> bool:
        """Whether weights are floats of 16 bits, and not codes in blocks."""
        return self.type in HALF_TYPES

    @property
    def has_target(self) -> bool:
        """Whether types are to be chosen by sensitivity."""
        return (self.target_size, self.target_bits) != (None, None)

    @property
    def word(self) -> str:
        """The type in a word, as names of folders end with."""
        return HALF_TYPES.get(self.type, self.type)

    def scheme(self, ops: str) -> Scheme:
        """The scheme of codes in blocks, with its defaults filled in.

        Args:
            ops: the operator set of the graphs.

        Raises:
            UsageError: a value that is not offered, a pattern that is no regular expression, an accuracy level for
                standard operators.
        """
        if self.accuracy_level is not None and ops != "fused":
            raise UsageError(
                f"--accuracy-level with {ops} operators",
                "fused operators",
                "ONNX Runtime's session option session.qdq_matmulnbits_accuracy_level sets it there",
            )
        return self._scheme(
            DEFAULT_ACCURACY_LEVEL if self.accuracy_level is None and ops == "fused" else self.accuracy_level
        )

    def _scheme(self, level: AccuracyLevel | None) -> Scheme:
        size = CODE_TYPES[self.type].block_size if self.block_size is None else self.block_size
        return Scheme(
            type=self.type,
            block_size=size,
            symmetric=self.symmetric is not False,
            accuracy_level=level,
            method=self.method or "rtn",
            exclude=self.exclude,
            tensor_types=tuple(map(parse_rule, self.tensor_types)),
        )


def options_of(type: str | None, **given: Any) -> QuantizeOptions | None:
    """What is asked for, where options may be given that ask for nothing; None where nothing is.

    Args:
        type: what `--quantize` names.
        given: further fields of `QuantizeOptions`.

    Raises:
        UsageError: options without a type, besides those of `QuantizeOptions`.
    """
    if type is not None:
        return QuantizeOptions(type, **given)
    if _asks_for_something(given):
        raise UsageError("options of a quantization scheme without --quantize", f"--quantize {_code_words()}")
    return None


def parse_type(text: str) -> str:
    """The type that a word after `--quantize` names, in any case.

    Raises:
        UsageError: a word that names none.
    """
    word = text.strip().lower()
    if (name := _code_name(word)) is not None:
        return name
    if (name := ALIASES.get(word)) in HALF_TYPES:
        return name
    words = [*CODE_TYPES, *HALF_TYPES.values()]
    raise UsageError(f"--quantize {text!r}", f"one of {', '.join(words)}", did_you_mean(word, words))


def parse_rule(text: str) -> TensorRule:
    """`REGEX=int8` or another type of codes.

    Raises:
        UsageError: anything else.
    """
    pattern, equals, word = text.rpartition("=")
    name = _code_name(word.strip().lower())
    if not equals or not pattern or name is None:
        expected = " or ".join(f"REGEX={known}" for known in CODE_TYPES)
        raise UsageError(f"--tensor-type {text!r}", expected, "a tensor that stays float: --exclude")
    return TensorRule(pattern, name)


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
    for pattern in scheme.patterns:
        if not any(re.search(pattern, name) for name in names):
            raise UsageError(
                f"pattern {pattern!r} is found in no matrix's name",
                f"names such as {names[1]!r} and {names[-1]!r}",
                "give a part of such a name",
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


def _asks_for_something(given: Mapping[str, Any]) -> bool:
    defaults = {field.name: field.default for field in dataclasses.fields(QuantizeOptions)}
    return any(value != defaults[name] for name, value in given.items() if name != "type")


def _code_name(word: str) -> str | None:
    return next((row.name for row in CODE_TYPES.values() if word in (row.name, *row.aliases)), None)


def _code_words() -> str:
    return " or ".join(CODE_TYPES)
