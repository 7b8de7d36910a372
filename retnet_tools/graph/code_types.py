"""Types of quantized weights, a row each, and how a matrix is stored in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from retnet_tools.errors import ConfigError
from retnet_tools.fields import check_types

if TYPE_CHECKING:
    # The command line shows the table in its help, and does not wait for numpy.
    from retnet_tools.weights import Array

BlockSize = Literal[32, 64, 128]


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
