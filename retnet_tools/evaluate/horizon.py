"""How long a head remembers: gamma as a half-life and a horizon in tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from retnet_tools.config import RetNetConfig

HORIZON_SHARE = 0.01


@dataclass(frozen=True)
class HeadMemory:
    """What gamma, the factor on the state at every token (Eq. 6), makes a head remember.

    Attributes:
        head: its label.
        log_gamma: in float64.
    """

    head: str
    log_gamma: float

    @property
    def gamma(self) -> float:
        """exp(log gamma)."""
        return math.exp(self.log_gamma)

    @property
    def half_life(self) -> float:
        """Tokens after which half of a contribution to the state is left: ln(1/2) / ln(gamma)."""
        return self.tokens_until(0.5)

    @property
    def horizon(self) -> float:
        """Tokens after which a hundredth is left: ln(0.01) / ln(gamma)."""
        return self.tokens_until(HORIZON_SHARE)

    def tokens_until(self, share: float) -> float:
        """n with gamma^n = share; infinite for gamma = 1."""
        return math.inf if self.log_gamma == 0 else math.log(share) / self.log_gamma


def decay_rows(config: RetNetConfig) -> Iterator[tuple[str, float]]:
    """(label, log gamma) of each head, the same in all layers; of its slowest and fastest pair where pairs differ."""
    for head, log_gamma in enumerate(config.decay):
        if config.key_decay:
            pairs = config.of_head(config.key_decay, head)
            yield f"{head}, slowest pair", log_gamma + max(pairs)
            yield f"{head}, fastest pair", log_gamma + min(pairs)
        else:
            yield str(head), log_gamma


def head_memories(config: RetNetConfig) -> tuple[HeadMemory, ...]:
    """The memory of every head."""
    return tuple(HeadMemory(head, log_gamma) for head, log_gamma in decay_rows(config))


def gamma_text(log_gamma: float) -> str:
    """gamma with five digits of 1 - gamma, so that 1 - 2^(-36) does not read 1."""
    rest = -math.expm1(log_gamma)
    if not 0 < rest < 0.5:
        return f"{math.exp(log_gamma):.6g}"
    return f"{math.exp(log_gamma):.{4 - math.floor(math.log10(rest))}f}"
