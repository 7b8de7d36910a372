"""Random models of every configuration, for tests of the forms and of the graph.

Norm weights and biases are random too (a test with ones and zeros would not see a forgotten one), and logits are of
order 1 to 10.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from retnet_tools.config import Activation, BlockNorm, FeedForward, HeadNorm, RetNetConfig, ScoreNormalization
from retnet_tools.paper import paper_config, paper_rotary_frequencies
from retnet_tools.weights import Array, TensorInfo, WeightSource, canonical_shapes

BASE = paper_config(vocab_size=61, hidden_size=32, value_dim=48, ffn_dim=40, num_layers=2, num_heads=4)
FEATURE_MAPS: tuple[Activation, ...] = ("silu", "gelu_tanh", "relu", "relu2", "leaky_relu", "elu", "sigmoid", "tanh")
FLA = replace(BASE, score_normalization=ScoreNormalization(8**-0.5, False, "none"))
_PAPER_SCORES = BASE.score_normalization

ABLATIONS: dict[str, RetNetConfig] = {
    "base": BASE,
    "tied": replace(BASE, tie_word_embeddings=True, embedding_scale=32**0.5),
    "no_gate": replace(BASE, gate=None),
    "gelu_gate": replace(BASE, gate="gelu"),
    "no_head_norm": replace(
        BASE, head_norm=HeadNorm("none", 0.0), score_normalization=replace(_PAPER_SCORES, clamp="none")
    ),
    "no_decay": replace(BASE, decay=(0.0,) * 4),
    "one_gamma": replace(BASE, decay=(float(np.log1p(-(2.0**-6))),) * 4),
    "one_head": replace(
        BASE, num_heads=1, decay=BASE.decay[:1], value_dim=24, rotary_frequencies=paper_rotary_frequencies(32)
    ),
    "other_head_sizes": replace(
        BASE,
        num_heads=3,
        key_dim=36,
        value_dim=15,
        decay=BASE.decay[:3],
        rotary_frequencies=tuple(10000.0 ** (-2 * i / 12) for i in range(6)),
        score_normalization=replace(_PAPER_SCORES, key_scale=12**-0.5),
    ),
    "layer_norm": replace(BASE, block_norm=BlockNorm("layer", 1e-5, bias=True)),
    "layer_norm_without_bias": replace(BASE, block_norm=BlockNorm("layer", 1e-5)),
    "layer_head_norm": replace(BASE, head_norm=HeadNorm("layer", 1e-6)),
    "shared_head_norm": replace(BASE, head_norm=HeadNorm("rms", 1e-5, "shared")),
    "channel_head_norm": replace(BASE, head_norm=HeadNorm("layer", 1e-5, "channel", bias=True)),
    "rms_with_bias": replace(BASE, block_norm=BlockNorm("rms", 1e-6, bias=True)),
    "large_head_norm_eps": replace(BASE, head_norm=HeadNorm("rms", 1e-3)),
    "post_norm": replace(BASE, norm_order="post", residual_alpha=4**0.25, final_norm=False),
    "pre_norm_alpha": replace(BASE, residual_alpha=4**0.25),
    "silu_glu": replace(BASE, feed_forward=FeedForward("glu", 40, "silu")),
    "plain_ffn": replace(BASE, feed_forward=FeedForward("plain", 40, "gelu", bias=True)),
    "plain_ffn_with_norm": replace(BASE, feed_forward=FeedForward("plain", 40, "gelu", True, BlockNorm("rms", 1e-6))),
    "plain_ffn_with_other_norm": replace(
        BASE, feed_forward=FeedForward("plain", 40, "gelu", True, BlockNorm("layer", 1e-5, bias=True))
    ),
    "relu_ffn": replace(BASE, feed_forward=FeedForward("plain", 40, "relu")),
    "projection_bias": replace(BASE, projection_bias=True),
    "no_score_normalization": replace(BASE, score_normalization=ScoreNormalization(1.0, False, "none")),
    "abs_of_sum": replace(BASE, score_normalization=replace(_PAPER_SCORES, clamp="abs_of_sum")),
    "no_final_norm": replace(BASE, final_norm=False),
    "branch_norm": replace(BASE, norm_order="branch", residual_alpha=1.5),
    "branch_norm_without_final": replace(BASE, norm_order="branch", final_norm=False, head_bias=True),
    "head_bias": replace(BASE, head_bias=True),
    "shared_key_value_heads": replace(BASE, num_kv_groups=2, projection_bias=True),
    "one_key_value_head": replace(BASE, num_kv_groups=4, head_norm=HeadNorm("rms", 1e-3)),
    "key_decay": replace(
        BASE, key_decay=(-0.2, -0.02, -0.003, 0.0), score_normalization=ScoreNormalization(0.5, False, "none")
    ),
    "head_rotation": replace(
        BASE,
        rotary_frequencies=paper_rotary_frequencies(32),
        key_decay=(*(-0.2 / (i + 1) for i in range(15)), 0.0),
        score_normalization=ScoreNormalization(0.5, False, "none"),
    ),
    "head_rotation_alone": replace(BASE, rotary_frequencies=paper_rotary_frequencies(32)),
    "head_key_decay_alone": replace(
        BASE,
        key_decay=tuple(-0.01 * i for i in range(16)),
        score_normalization=ScoreNormalization(0.5, False, "none"),
    ),
    "parallel_residual": replace(BASE, parallel_residual=True, residual_alpha=4**0.25),
    "shared_block_norm": replace(
        BASE, parallel_residual=True, shared_block_norm=True, final_norm=False, output_norm=BlockNorm("rms", 1e-6)
    ),
    "output_norm": replace(BASE, output_norm=BlockNorm("layer", 1e-5, bias=True)),
    "output_norm_alone": replace(
        BASE, norm_order="branch", final_norm=False, output_norm=BlockNorm("rms", 1e-3), tie_word_embeddings=True
    ),
    "retnet_xatl": replace(
        BASE,
        rotary_frequencies=(1.0, 0.01, 0.0, 0.0),
        score_normalization=ScoreNormalization(8**-0.5, False, "none"),
        block_norm=BlockNorm("layer", 1e-5, bias=True),
        feed_forward=FeedForward("plain", 40, "gelu_tanh", bias=True),
        parallel_residual=True,
        projection_bias=True,
    ),
    "syncdoth_first": replace(
        BASE,
        rotary_frequencies=tuple(10000.0 ** (-i / 16) for i in range(16)),
        key_decay=tuple(float(np.log((2 * i + 12.8) / 44.8) / 512) for i in range(16)),
        score_normalization=ScoreNormalization(8**-0.5, False, "none"),
        head_norm=HeadNorm("layer", 1e-5),
        tie_word_embeddings=True,
        block_norm=BlockNorm("layer", 1e-5, bias=True),
        feed_forward=FeedForward("plain", 40, "gelu", bias=True),
        final_norm=False,
    ),
    "stack": replace(BASE, vocab_size=0),
    "jamie_stirling": replace(
        BASE,
        vocab_size=0,
        key_decay=tuple(float(np.log((2 * i + 3.2) / 11.2) / 512) for i in range(4)),
        score_normalization=ScoreNormalization(1.0, False, "none"),
        head_norm=HeadNorm("layer", 1e-5, "channel", bias=True),
        block_norm=BlockNorm("layer", 1e-5, bias=True),
        feed_forward=FeedForward("plain", 40, "gelu", bias=True),
        final_norm=False,
    ),
    **{f"feature_map_{name}": replace(FLA, feature_map=name) for name in FEATURE_MAPS},
    "embedding_norm": replace(BASE, embedding_norm=True),
    "torchscale_2023": replace(
        BASE,
        score_normalization=replace(_PAPER_SCORES, clamp="abs_of_sum"),
        head_norm=HeadNorm("layer", 1e-6),
        block_norm=BlockNorm("layer", 1e-5, bias=True),
        feed_forward=FeedForward("plain", 40, "gelu", True, BlockNorm("layer", 1e-5, bias=True)),
        projection_bias=True,
        embedding_norm=True,
        embedding_scale=32**0.5,
        tie_word_embeddings=True,
    ),
}

OTHER_LAYERS = (
    "head_rotation",
    "parallel_residual",
    "shared_block_norm",
    "output_norm",
    "retnet_xatl",
    "syncdoth_first",
)
"""Models whose heads each rotate and decay on their own, or whose blocks and norms are joined otherwise."""


@dataclass(frozen=True)
class MemorySource(WeightSource):
    """A `WeightSource` over arrays in memory."""

    tensors: dict[str, Array]

    def names(self) -> Iterable[str]:
        return self.tensors.keys()

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self.tensors[name].shape, self.tensors[name].dtype)

    def read(self, name: str) -> Array:
        return self.tensors[name].copy()


def random_source(config: RetNetConfig, seed: int, dtype: npt.DTypeLike = np.float32) -> MemorySource:
    """Weights that make every part matter: unit gain in projections, norm weights in 0.5 to 1.5, biases of 0.1."""
    rng = np.random.default_rng(seed)
    tied = config.tie_word_embeddings
    tensors = {}
    for name, shape in canonical_shapes(config).items():
        if name.endswith(".bias"):
            values = 0.1 * rng.standard_normal(shape)
        elif len(shape) == 1:
            values = rng.uniform(0.5, 1.5, shape)
        elif name == "embedding.weight" and not tied:
            values = rng.standard_normal(shape)
        else:
            values = rng.standard_normal(shape) / np.sqrt(shape[1])
        tensors[name] = values.astype(dtype)
    return MemorySource(tensors)


def random_tokens(config: RetNetConfig, batch: int, length: int, seed: int) -> npt.NDArray[Any]:
    """Token ids `[batch, length]` int64; for a stack without embedding, float32 embeddings `[batch, length, D]`."""
    if not config.has_vocabulary:
        return np.random.default_rng(seed).standard_normal((batch, length, config.hidden_size)).astype(np.float32)
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length), dtype=np.int64)


# Source of a function for scripts that tests start. Not ru_maxrss: a process starts with its parent's.
PEAK_RESIDENT = """
def peak_resident():
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
"""
