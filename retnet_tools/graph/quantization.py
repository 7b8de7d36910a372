"""What quantized weights are: the scheme that was asked for, and what retnet.json says came of it.

Plain data, checked at construction and read back from JSON without loss (`retnet_tools.fields`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from retnet_tools.errors import ConfigError
from retnet_tools.fields import check_size, check_types, from_json

if TYPE_CHECKING:
    # The command line shows the table in its help, and does not wait for numpy.
    from retnet_tools.weights import Array

BlockSize = Literal[32, 64, 128]
AccuracyLevel = Literal[0, 1, 4]


def pack_pairs(codes: Array) -> Array:
    """Codes of 4 bits, neighbours along the last axis in one byte, the low bits first; an odd one is alone."""
    packed = codes[..., 0::2] & 15
    packed[..., : codes.shape[-1] // 2] |= codes[..., 1::2] << 4
    return packed


@dataclass(frozen=True)
class CodeType:
    """A row of the table of types for weights in blocks.

    Attributes:
        bits: of a code.
        aliases: further words for it.
        block_size: where none is asked for.
        targets: where the largest weight of a symmetric block is tried, in steps, whose codes reach from -2^(bits-1) to
            2^(bits-1) - 1 (`retnet_tools.quantize.blockwise`).
        element: the ONNX integers that hold a code where DequantizeLinear reads it; with a `u` before it if unsigned.
        pack: `[..., n]` codes to `[..., ceil(n bits / 8)]` bytes, the low bits of a byte first; higher bits than a
            code has are to be left out.
    """

    name: str
    bits: int
    aliases: tuple[str, ...]
    block_size: BlockSize
    targets: tuple[float, ...]
    element: str
    pack: Callable[[Array], Array]

    def packed_bytes(self, codes: int) -> int:
        """Bytes of codes side by side."""
        return -(-codes * self.bits // 8)


CODE_TYPES: dict[str, CodeType] = {
    row.name: row
    for row in (
        CodeType(
            name="int8",
            bits=8,
            aliases=("q8",),
            # 8 bits lose little at any block size, and larger blocks are faster.
            block_size=128,
            targets=(-129.0, -128.4, -127.5, -126.0, 127.4, 126.5, 125.5, 124.0),
            element="int8",
            pack=lambda codes: codes,
        ),
        CodeType(
            name="int4",
            bits=4,
            aliases=("q4",),
            # Of the shipped model's weights 8.0% are lost (root of mean square) at 32, 8.8% at 64 and 9.5% at 128, for
            # 5, 4.5 and 4.25 bits a weight.
            block_size=64,
            # With these the root mean square error is within 0.4% of that of 60 targets.
            targets=(-9.2, -8.6, -8.2, -7.8, -7.2, 7.4, 7.9, 8.5),
            element="int4",
            pack=pack_pairs,
        ),
    )
}
HALF_TYPES = {"float16": "fp16", "bfloat16": "bf16"}
"""Float types of 16 bits, and the words for them."""
CodeName = Annotated[str, CODE_TYPES]
HalfName = Annotated[str, HALF_TYPES]


@dataclass(frozen=True)
class BlockFormat:
    """How a matrix `[N, K]` is stored: w = (code - zero_point) * scale, blocks of neighbours along K sharing a scale.

    Attributes:
        bits: of a code, which is 0 to 2^bits - 1.
        block_size: columns that share a scale; the last block of a row may be shorter.
        symmetric: the zero point is 2^(bits-1) everywhere and is not stored; otherwise each block has its own.
    """

    bits: int
    block_size: BlockSize
    symmetric: bool

    def __post_init__(self) -> None:
        check_types(self, "block_format.")
        if self.bits not in (known := [row.bits for row in CODE_TYPES.values()]):
            raise ConfigError(f"block_format.bits is {self.bits}", f"one of {', '.join(map(str, known))}")

    @property
    def type(self) -> CodeType:
        """The row of its codes."""
        return next(row for row in CODE_TYPES.values() if row.bits == self.bits)

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


def matrix_bytes(shape: tuple[int, ...], format: BlockFormat | None, float_size: int) -> int:
    """Bytes of a tensor, or of a matrix `[N, K]` in blocks by rows: bits + 8 float_size / block_size a weight, and
    bits / block_size where it is asymmetric. The last block of a row is filled up, and zero points end with a byte.

    Args:
        format: None where it stays float.
        float_size: bytes of a float, which scales are too.
    """
    if format is None:
        return math.prod(shape) * float_size
    rows, columns = shape
    blocks, packed = format.blocks(columns), format.type.packed_bytes
    return rows * (blocks * (packed(format.block_size) + float_size) + (0 if format.symmetric else packed(blocks)))


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
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"pattern {pattern!r} ({error})", "a regular expression") from error
