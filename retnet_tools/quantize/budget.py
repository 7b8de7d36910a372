"""Types for matrices so that the whole keeps to a size and diverges as little as may be.

Divergences are taken to add up, so the sum over matrices of their own is what is to be small. From the smallest types
on, whichever step to a larger type saves most divergence a byte and still fits is taken, until none fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from retnet_tools.errors import UsageError
from retnet_tools.graph.quantization import BlockFormat, WeightType


@dataclass(frozen=True)
class Budget:
    """What the weights may take; one of the two.

    Attributes:
        size: bytes of weights.data.
        bits: a weight, on average over all matrices, scales and zero points included.
    """

    size: int | None = None
    bits: float | None = None

    def __post_init__(self) -> None:
        if (self.size is None) == (self.bits is None):
            raise UsageError("--target-size and --target-bits together", "one of them")
        if self.bits is not None and not 0 < self.bits < math.inf:
            raise UsageError(f"--target-bits {self.bits}", "a positive number")


@dataclass(frozen=True)
class Choice:
    """A type that some matrices may have together.

    Attributes:
        type: None stays float.
        size: bytes of the matrices.
        divergence: what it costs, nats a token; finite.
    """

    type: WeightType | None
    size: int
    divergence: float

    def __post_init__(self) -> None:
        # NaN is neither more nor less than another: what is chosen would be an accident.
        if not math.isfinite(self.divergence):
            raise ValueError(f"a divergence of {self.divergence}")


def fill_budget(choices: Sequence[Sequence[Choice]], size: int) -> list[Choice]:
    """One choice for each of several groups of matrices, of `size` bytes together at most.

    Args:
        choices: of each group, the smallest first.
        size: not below what the first choices of all groups take.
    """
    chosen = [options[0] for options in choices]
    left = size - sum(choice.size for choice in chosen)
    while True:
        steps = [
            ((now.divergence - option.divergence) / (option.size - now.size), i, option)
            for i, (now, options) in enumerate(zip(chosen, choices, strict=True))
            for option in options
            if 0 < option.size - now.size <= left and option.divergence < now.divergence
        ]
        if not steps:
            return chosen
        _, i, option = max(steps, key=lambda step: step[:2])
        left -= option.size - chosen[i].size
        chosen[i] = option


def matrix_bytes(shape: tuple[int, ...], format: BlockFormat | None, float_size: int) -> int:
    """Bytes of a matrix `[N, K]` in weights.data, for the layout by rows.

    Args:
        format: None where it stays float.
        float_size: bytes of a float, which scales are too.
    """
    rows, columns = shape
    if format is None:
        return rows * columns * float_size
    blocks = format.blocks(columns)
    zeros = 0 if format.symmetric else math.ceil(blocks * format.bits / 8)
    return rows * (blocks * (format.block_size * format.bits // 8 + float_size) + zeros)
