"""What quantized weights are: the scheme that was asked for, and what retnet.json says came of it.

Plain data, checked at construction and read back from JSON without loss (`retnet_tools.fields`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from retnet_tools.errors import ConfigError
from retnet_tools.fields import check_size, check_types, from_json

WeightType = Literal["int8", "int4"]
Bits = Literal[8, 4]
BlockSize = Literal[32, 64, 128]
AccuracyLevel = Literal[0, 1, 4]
BITS: dict[WeightType, Bits] = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class BlockFormat:
    """How a matrix `[N, K]` is stored: w = (code - zero_point) * scale, blocks of neighbours along K sharing a scale.

    Attributes:
        bits: of a code, which is 0 to 2^bits - 1.
        block_size: columns that share a scale; the last block of a row may be shorter.
        symmetric: the zero point is 2^(bits-1) everywhere and is not stored; otherwise each block has its own.
    """

    bits: Bits
    block_size: BlockSize
    symmetric: bool

    def __post_init__(self) -> None:
        check_types(self, "block_format.")

    @property
    def middle(self) -> int:
        """The zero point of a symmetric block."""
        return 1 << (self.bits - 1)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def blocks(self, columns: int) -> int:
        """Blocks in a row of `columns` columns."""
        return -(-columns // self.block_size)


@dataclass(frozen=True)
class TensorRule:
    """Tensors of another type than the rest: those in whose canonical name `pattern` is found."""

    pattern: str
    type: WeightType

    def __post_init__(self) -> None:
        check_types(self, "tensor_type.")
        _compiled(self.pattern)


@dataclass(frozen=True)
class Scheme:
    """What is to be quantized, and how.

    Attributes:
        type: of all matrices (linear layers, embedding, output head) but those that follow say otherwise about.
        block_size: of all of them.
        symmetric: of all of them.
        accuracy_level: of MatMulNBits on the CPU: 4 multiplies in int8, with activations quantized by blocks; 0 and 1
            in float32. None with standard operators, where the runtime chooses.
        method: how codes are chosen, by name.
        exclude: patterns; a matrix in whose canonical name one is found stays float.
        tensor_types: rules; the last one that fits a matrix decides its type. `exclude` goes before them.
    """

    type: WeightType
    block_size: BlockSize
    symmetric: bool = True
    accuracy_level: AccuracyLevel | None = 4
    method: str = "rtn"
    exclude: tuple[str, ...] = ()
    tensor_types: tuple[TensorRule, ...] = ()

    def __post_init__(self) -> None:
        check_types(self, "scheme.")
        for pattern in self.exclude:
            _compiled(pattern)

    def format_of(self, name: str) -> BlockFormat | None:
        """The format of a matrix by its canonical name; None where it stays float."""
        if any(re.search(pattern, name) for pattern in self.exclude):
            return None
        fitting = [rule.type for rule in self.tensor_types if re.search(rule.pattern, name)]
        return BlockFormat(BITS[fitting[-1] if fitting else self.type], self.block_size, self.symmetric)


@dataclass(frozen=True)
class Calibration:
    """The text that a calibrated method saw: its file's name, its sha256, and how many tokens of it."""

    text: str
    sha256: str
    tokens: int

    def __post_init__(self) -> None:
        check_types(self, "calibration.")
        check_size("calibration.tokens", self.tokens)


@dataclass(frozen=True)
class Quality:
    """How far a quantized model is from the float one on a text.

    Attributes:
        text, sha256, tokens: the text, as in `Calibration`.
        perplexity, float_perplexity: exp of the mean cross-entropy a token, of the two models.
        mean_kl: KL divergence of the quantized model from the float one, mean over tokens, nats.
        same_top: share of tokens at which both find the same one most likely.
    """

    text: str
    sha256: str
    tokens: int
    perplexity: float
    float_perplexity: float
    mean_kl: float
    same_top: float

    def __post_init__(self) -> None:
        check_types(self, "quality.")
        check_size("quality.tokens", self.tokens)


@dataclass(frozen=True)
class Quantization:
    """The field `quantization` of retnet.json.

    Attributes:
        float_bytes: of weights.data with every matrix in the export's float type.
        weight_bytes: of weights.data as it is.
        calibration: of a calibrated method.
        quality: where it was measured.
    """

    scheme: Scheme
    float_bytes: int
    weight_bytes: int
    calibration: Calibration | None = None
    quality: Quality | None = None

    def __post_init__(self) -> None:
        check_types(self, "quantization.")
        check_size("quantization.float_bytes", self.float_bytes)
        check_size("quantization.weight_bytes", self.weight_bytes)

    def fingerprint(self) -> str:
        """The scheme, and a hash of all that decided the codes; not what was measured afterwards."""
        decided = dataclasses.asdict(dataclasses.replace(self, quality=None))
        digest = hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()
        return f"{self.scheme.type} by {self.scheme.method} ({digest[:12]})"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that `from_dict` reads back exactly."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Quantization:
        """Inverse of `to_dict`, as JSON gives it back.

        Raises:
            ConfigError: a field that is unknown, missing or of the wrong type, by name.
        """
        quantization: Quantization = from_json(cls, data, "quantization")
        return quantization


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"pattern {pattern!r} ({error})", "a regular expression") from error
