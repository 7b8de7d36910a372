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
from retnet_tools.graph.code_types import CODE_TYPES, BlockFormat, BlockSize, CodeName, HalfName

AccuracyLevel = Literal[0, 1, 4]
MAX_PATTERN, MAX_REPETITIONS = 200, 4


@dataclass(frozen=True)
class TensorRule:
    """Tensors of another type than the rest: those in whose canonical name `pattern` is found."""

    pattern: str
    type: CodeName

    def __post_init__(self) -> None:
        check_types(self, "tensor_type.")
        _compiled(self.pattern)


@dataclass(frozen=True)
class Scheme:
    """What is to be quantized, and how.

    Attributes:
        type: of all matrices (linear layers, embedding, output head) but those that follow say otherwise about.
        block_size, symmetric: of all of them.
        accuracy_level: of MatMulNBits on the CPU: 4 multiplies in int8, with activations quantized by blocks; 0 and 1
            in float32. None with standard operators, where the runtime chooses.
        method: how codes are chosen, by name.
        exclude: patterns; a matrix in whose canonical name one is found stays float.
        tensor_types: rules; the last one that fits a matrix decides its type. `exclude` goes before them.
    """

    type: CodeName
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

    @property
    def patterns(self) -> tuple[str, ...]:
        """Those that say something about some matrices."""
        return (*self.exclude, *(rule.pattern for rule in self.tensor_types))

    def format_of(self, name: str) -> BlockFormat | None:
        """The format of a matrix by its canonical name; None where it stays float."""
        if any(re.search(pattern, name) for pattern in self.exclude):
            return None
        fitting = [rule.type for rule in self.tensor_types if re.search(rule.pattern, name)]
        return BlockFormat(CODE_TYPES[fitting[-1] if fitting else self.type].bits, self.block_size, self.symmetric)


@dataclass(frozen=True)
class HalfScheme:
    """Weights and activations in a float type of 16 bits, each weight rounded to nearest."""

    type: HalfName
    method: Literal["rtn"] = "rtn"

    def __post_init__(self) -> None:
        check_types(self, "scheme.")


@dataclass(frozen=True)
class Calibration:
    """The tokens that something was learnt from.

    Attributes:
        text: the file's name.
        sha256: of the file.
        tokens: how many of its tokens were taken.
        sequence: how many of them follow one another in the text; None, like the next two, in records of before it
            was written down.
        seed: of the draw.
        ids_sha256: of the token ids in order, as int64, low bytes first.
    """

    text: str
    sha256: str
    tokens: int
    sequence: int | None = None
    seed: int | None = None
    ids_sha256: str | None = None

    def __post_init__(self) -> None:
        check_types(self, "calibration.")
        check_size("calibration.tokens", self.tokens)


@dataclass(frozen=True)
class MatrixSensitivity:
    """What quantizing some matrices alone costs.

    Attributes:
        matrices: canonical names of those that were quantized together.
        type: as what, to nearest.
        mean_kl: KL divergence of the logits from the float model's, mean over tokens, nats.
    """

    matrices: tuple[str, ...]
    type: CodeName
    mean_kl: float

    def __post_init__(self) -> None:
        check_types(self, "sensitivity.")


@dataclass(frozen=True)
class MixedPrecision:
    """How types were chosen by sensitivity; the choice itself stands in the scheme's rules.

    Attributes:
        target_size, target_bits: what to keep to, bytes of weights.data or bits a weight.
        text: what sensitivities were measured on.
        predicted_kl: sum of the sensitivities of the types that were chosen.
        measured_kl: KL divergence with all of them, rounded to nearest.
        sensitivities: all that were measured.
    """

    target_size: int | None
    target_bits: float | None
    text: Calibration
    predicted_kl: float
    measured_kl: float
    sensitivities: tuple[MatrixSensitivity, ...]

    def __post_init__(self) -> None:
        check_types(self, "mixed_precision.")


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
        float_bytes: of weights.data before: with every matrix in the export's float type, float32 for a half type.
        weight_bytes: of weights.data as it is.
        calibration: what a calibrated method learnt from.
        coarse_blocks: blocks of weights other than 0 whose scale is below the normal numbers of its type, so that it
            is inexact.
    """

    scheme: Scheme | HalfScheme
    float_bytes: int
    weight_bytes: int
    calibration: Calibration | None = None
    quality: Quality | None = None
    mixed_precision: MixedPrecision | None = None
    coarse_blocks: int = 0

    def __post_init__(self) -> None:
        check_types(self, "quantization.")
        check_size("quantization.float_bytes", self.float_bytes)
        check_size("quantization.weight_bytes", self.weight_bytes)

    @property
    def blocks(self) -> Scheme | None:
        """The scheme of matrices in blocks; None where all weights are floats."""
        return self.scheme if isinstance(self.scheme, Scheme) else None

    def fingerprint(self) -> str:
        """The scheme, and a hash of all that decided the codes; not what was measured before or afterwards.

        Of weights that are floats `none`, as of any export: their type says it all.
        """
        if self.blocks is None:
            return "none"
        decided = dataclasses.asdict(dataclasses.replace(self, quality=None))
        del decided["mixed_precision"], decided["coarse_blocks"]
        if self.calibration is not None:
            # Records of before more was written down keep the hash that they had.
            decided["calibration"] = {n: value for n, value in decided["calibration"].items() if value is not None}
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
    # Records of strangers hold patterns too: each repetition multiplies the time that a name can take.
    plain = re.sub(r"\\.|\(\?|\[\^?\]?[^\]]*\]", "", pattern[: MAX_PATTERN + 1], flags=re.DOTALL)
    if len(pattern) > MAX_PATTERN or sum(map(plain.count, "*+{?")) > MAX_REPETITIONS or re.search(r"\)[*+{]", plain):
        expected = f"at most {MAX_PATTERN} characters and {MAX_REPETITIONS} repetitions, none of a group"
        raise ConfigError(f"pattern {pattern[:60]!r}", expected)
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"pattern {pattern!r} ({error})", "a regular expression") from error
