"""The published architecture: the schedules, the configuration and the sizes of the official code.

Source: Sun et al. 2023, arXiv 2307.08621, and microsoft/torchscale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retnet_tools.config import BlockNorm, FeedForward, HeadNorm, RetNetConfig, ScoreNormalization
from retnet_tools.errors import UsageError, did_you_mean

VOCABULARY_SIZE = 50257
"""Of models of a published size that are made here: the vocabulary of GPT-2."""


def paper_decay(num_heads: int) -> tuple[float, ...]:
    """log(gamma) of the official code: gamma_h = 1 - 2^(-5-h), h from 0, in float64 (Eq. 8)."""
    return tuple(float(np.log1p(-(2.0 ** (-5 - h)))) for h in range(num_heads))


def language_model_decay(num_heads: int) -> tuple[float, ...]:
    """log(gamma) of the paper's experiments: gamma = 1 - exp(linspace(log 1/32, log 1/512, H)), in float64."""
    return tuple(float(g) for g in np.log1p(-np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), num_heads))))


def paper_rotary_frequencies(head_k_dim: int) -> tuple[float, ...]:
    """theta_i = 10000^(-i / (K/2 - 1)), i from 0 to K/2 - 1, in float64: torchscale's linspace(0, 1, K/2)."""
    return tuple(float(f) for f in 10000.0 ** -np.linspace(0.0, 1.0, head_k_dim // 2))


def paper_score_normalization(head_k_dim: int) -> ScoreNormalization:
    """All three steps, as torchscale's current code applies them."""
    return ScoreNormalization(key_scale=head_k_dim**-0.5, by_decay=True, clamp="sum_of_abs")


def paper_config(
    *,
    vocab_size: int,
    hidden_size: int,
    value_dim: int,
    ffn_dim: int,
    num_layers: int,
    num_heads: int,
    norm_eps: float = 1e-6,
    tie_word_embeddings: bool = False,
) -> RetNetConfig:
    """The architecture of the official code since October 2023: RMSNorm, GLU, swish gate, no biases, pre-norm."""
    head_k_dim = hidden_size // num_heads
    return RetNetConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        key_dim=hidden_size,
        value_dim=value_dim,
        decay=paper_decay(num_heads),
        rotary_frequencies=paper_rotary_frequencies(head_k_dim),
        score_normalization=paper_score_normalization(head_k_dim),
        head_norm=HeadNorm("rms", norm_eps),
        block_norm=BlockNorm("rms", norm_eps),
        feed_forward=FeedForward("glu", ffn_dim, "gelu"),
        tie_word_embeddings=tie_word_embeddings,
    )


@dataclass(frozen=True)
class ModelSize:
    """A published size: torchscale's presets (whose `xl` is the 1.3b here), syncdoth's 300m, the paper's 2.7b and
    6.7b."""

    name: str
    hidden_size: int
    value_dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int

    def config(self, vocab_size: int) -> RetNetConfig:
        """The model of this size with the official architecture."""
        return paper_config(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            value_dim=self.value_dim,
            ffn_dim=self.ffn_dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
        )


MODEL_SIZES: dict[str, ModelSize] = {
    size.name: size
    for size in (
        ModelSize("base", 512, 864, 864, 6, 2),
        ModelSize("medium", 1024, 1728, 1728, 16, 4),
        ModelSize("300m", 1280, 2560, 2560, 12, 8),
        ModelSize("1.3b", 2048, 3456, 3456, 24, 8),
        ModelSize("2.7b", 2560, 5120, 5120, 32, 10),
        ModelSize("3b", 2560, 4280, 4280, 32, 10),
        ModelSize("6.7b", 4096, 8192, 8192, 32, 16),
        ModelSize("7b", 4096, 6912, 6912, 32, 16),
        ModelSize("13b", 5120, 8560, 8560, 40, 20),
        ModelSize("65b", 8192, 13824, 13824, 64, 32),
    )
}
_OTHER_NAMES = {"xl": "1.3b"}


def model_size(name: str) -> ModelSize:
    """The published size of a name, in any case; torchscale's `xl` is 1.3b.

    Raises:
        UsageError: there is none.
    """
    word = name.strip().lower()
    size = MODEL_SIZES.get(_OTHER_NAMES.get(word, word))
    if size is None:
        names = [*MODEL_SIZES, *_OTHER_NAMES]
        raise UsageError(f"--size {name!r}", f"one of {', '.join(names)}", did_you_mean(word, names))
    return size
