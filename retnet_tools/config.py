"""What a RetNet is, in numbers: the configuration that every other part reads.

A `RetNetConfig` is fully resolved. It holds no name of a checkpoint format and no rule that still has to be
evaluated: schedules are tuples of float64, and choices are values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from retnet_tools.errors import ConfigError
from retnet_tools.fields import check_not_negative, check_positive, check_size, check_types, from_json

MAX_LAYERS, MAX_WIDTH, MAX_VOCABULARY, MAX_STATE = 1 << 10, 1 << 20, 1 << 24, 1 << 28
"""Sizes beyond those of any model, of which tables and states would fill a machine."""
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "leaky_relu", "elu", "sigmoid", "tanh"]
NormKind = Literal["rms", "layer"]
HeadNormKind = Literal["rms", "layer", "none"]
HeadNormWeight = Literal["none", "shared", "channel"]
ScoreClamp = Literal["none", "abs_of_sum", "sum_of_abs"]
FeedForwardKind = Literal["glu", "plain"]
NormOrder = Literal["pre", "post", "branch"]


@dataclass(frozen=True)
class ScoreNormalization:
    """The three steps of the paper's section "Retention Score Normalization".

    Attributes:
        key_scale: factor on k; the paper's QK^T / sqrt(K) is 1/sqrt(K) here, so that the state carries it.
        by_decay: D_nm / sqrt(sum_i D_ni). The divisor depends on the position alone.
        clamp: R_nm / max(|sum_i R_ni|, 1) (`abs_of_sum`, the paper) or R_nm / clip(sum_i |R_ni|, 1, 5e4)
            (`sum_of_abs`, torchscale since late 2023). The divisor depends on the data, so only the parallel form
            knows it; the head norm cancels it up to its epsilon.
    """

    key_scale: float
    by_decay: bool
    clamp: ScoreClamp

    def __post_init__(self) -> None:
        check_types(self, "score_normalization.")
        check_positive("score_normalization.key_scale", self.key_scale)


@dataclass(frozen=True)
class HeadNorm:
    """The normalisation of each head's output (GroupNorm_h of Eq. 8).

    Attributes:
        kind: `rms` divides by the root mean square, `layer` subtracts the mean first, `none` is the ablation.
        eps: added to the mean square (or variance) before the root.
        weight: no weight, one `[V]` shared by all heads, or one `[H*V]`.
        bias: whether a bias of the weight's shape is added.
    """

    kind: HeadNormKind
    eps: float
    weight: HeadNormWeight = "none"
    bias: bool = False

    def __post_init__(self) -> None:
        check_types(self, "head_norm.")
        check_not_negative("head_norm.eps", self.eps)
        if self.bias and self.weight == "none":
            raise ConfigError("head_norm.bias without head_norm.weight", "both or neither")
        if self.kind == "none" and self.weight != "none":
            raise ConfigError("head_norm.weight without a head norm", "weight 'none'")


@dataclass(frozen=True)
class BlockNorm:
    """The norm around each block: RMSNorm, or LayerNorm with or without bias."""

    kind: NormKind
    eps: float
    bias: bool = False

    def __post_init__(self) -> None:
        check_types(self, "block_norm.")
        check_not_negative("block_norm.eps", self.eps)


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward network of Eq. 9.

    Attributes:
        kind: `glu` is down(act(gate x) * up x); `plain` is down(act(up x)).
        dim: inner size.
        activation: `gelu` is the erf one, `gelu_tanh` its approximation; `relu2` is relu squared.
        bias: whether the projections have biases.
        norm: the norm between the activation and `down` (torchscale's sub-LayerNorm), or None.
    """

    kind: FeedForwardKind
    dim: int
    activation: Activation
    bias: bool = False
    norm: BlockNorm | None = None

    def __post_init__(self) -> None:
        check_types(self, "feed_forward.")
        check_size("feed_forward.dim", self.dim)


@dataclass(frozen=True)
class RetNetConfig:
    """A RetNet, fully resolved.

    Sizes `key_dim` and `value_dim` are totals over query heads. `decay` is log(gamma) per head; `rotary_frequencies`
    are radians per position for each pair of key dimensions (theta of Eq. 3), pairs being adjacent (interleaved). Both
    are float64. `rotary_frequencies` and `key_decay` hold K/2 numbers that all heads share, or H*K/2, those of one head
    after another.

    Attributes:
        vocab_size: 0 for a stack without embedding and head, which maps embeddings to hidden states.
        key_decay: what each pair of key dimensions adds to `decay` (the z^(1/512) of xPos); empty where gamma is one
            number a head.
        num_kv_groups: adjacent query heads that share one head of k and v.
        feature_map: activation of q and k before the rotation, or None.
        gate: activation of the gate of Eq. 8, or None for the ablation without a gate.
        norm_order: `pre` is alpha x + f(norm(x)); `post` is norm(alpha x + f(x)) (DeepNorm); `branch` is
            alpha x + norm(f(x)).
        parallel_residual: both blocks read one residual stream: X' = alpha X + MSR(LN_1 X) + FFN(LN_2 X), in place of
            one after the other (Eq. 9); pre-norm only.
        shared_block_norm: the feed-forward network reads LN_1 X too, and there is no LN_2; with `parallel_residual`.
        residual_alpha: the alpha of DeepNorm; 1 otherwise.
        output_norm: a further norm between the final one and the output projection, or None.
        embedding_scale: factor on the embedding's output.
        head_bias: whether the output projection has a bias.

    Raises:
        ConfigError: a field of the wrong type, an unknown choice, sizes that do not divide, schedules of the wrong
            length.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    key_dim: int
    value_dim: int
    decay: tuple[float, ...]
    rotary_frequencies: tuple[float, ...]
    score_normalization: ScoreNormalization
    head_norm: HeadNorm
    block_norm: BlockNorm
    feed_forward: FeedForward
    key_decay: tuple[float, ...] = ()
    num_kv_groups: int = 1
    feature_map: Activation | None = None
    gate: Activation | None = "silu"
    norm_order: NormOrder = "pre"
    parallel_residual: bool = False
    shared_block_norm: bool = False
    residual_alpha: float = 1.0
    final_norm: bool = True
    output_norm: BlockNorm | None = None
    projection_bias: bool = False
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    tie_word_embeddings: bool = False
    head_bias: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        self._check_sizes()
        self._check_schedules()
        check_positive("residual_alpha", self.residual_alpha)
        check_positive("embedding_scale", self.embedding_scale)
        around = (self.embedding_scale != 1, self.embedding_norm, self.tie_word_embeddings, self.head_bias)
        if self.parallel_residual and self.norm_order != "pre":
            raise ConfigError(f"parallel_residual with norm_order {self.norm_order!r}", "norm_order 'pre'")
        if self.shared_block_norm and not self.parallel_residual:
            raise ConfigError("shared_block_norm without parallel_residual", "both, or a norm for each block")
        if self.tie_word_embeddings and self.head_bias:
            raise ConfigError("head_bias with tie_word_embeddings", "one or the other")
        if not self.has_vocabulary and any(around):
            raise ConfigError("vocab_size 0 with parts of an embedding or a head", "none of them on a bare stack")

    def _check_sizes(self) -> None:
        if self.vocab_size != 0:
            check_size("vocab_size", self.vocab_size)
        for name in ("hidden_size", "num_layers", "num_heads", "num_kv_groups", "key_dim", "value_dim"):
            check_size(name, getattr(self, name))
        limits = {"num_layers": MAX_LAYERS, "vocab_size": MAX_VOCABULARY}
        for name in ("vocab_size", "hidden_size", "num_layers", "key_dim", "value_dim"):
            if (size := getattr(self, name)) > (most := limits.get(name, MAX_WIDTH)):
                raise ConfigError(f"{name} is {size}", f"at most {most}")
        if (size := self.key_dim * self.value_dim // self.num_heads) > MAX_STATE:
            raise ConfigError(f"key_dim and value_dim make a state of {size} numbers", f"at most {MAX_STATE}")
        for name in ("key_dim", "value_dim"):
            if getattr(self, name) % self.num_heads:
                raise ConfigError(
                    f"{name} {getattr(self, name)} with {self.num_heads} heads", "a multiple of the heads"
                )
        if self.num_heads % self.num_kv_groups:
            raise ConfigError(f"num_kv_groups is {self.num_kv_groups}", f"a divisor of {self.num_heads} heads")
        if self.head_k_dim % 2:
            raise ConfigError(f"head_k_dim is {self.head_k_dim}", "an even number, since rotation works on pairs")

    def _check_schedules(self) -> None:
        pairs = self.head_k_dim // 2
        if len(self.decay) != self.num_heads:
            raise ConfigError(
                f"decay of {len(self.decay)} numbers", f"one log(gamma) for each of {self.num_heads} heads"
            )
        lengths, words = (pairs, self.num_heads * pairs), f"head_k_dim / 2 = {pairs}, or as many for each head"
        if len(self.key_decay) not in (0, *lengths):
            raise ConfigError(f"key_decay of {len(self.key_decay)} numbers", f"none, or {words}")
        if any(g > 0 for g in (*self.decay, *self.key_decay)):
            raise ConfigError(f"decay {self.decay}, key_decay {self.key_decay}", "log(gamma) <= 0")
        if self.key_decay and self.score_normalization.by_decay:
            raise ConfigError("score_normalization.by_decay with key_decay", "one gamma a head to sum the powers of")
        if (given := len(self.rotary_frequencies)) not in lengths:
            raise ConfigError(f"rotary_frequencies of {given} numbers", words)
        if self.num_kv_groups > 1 and pairs < max(given, len(self.key_decay)):
            raise ConfigError("rotary_frequencies or key_decay of each head with shared key heads", words)

    @property
    def head_k_dim(self) -> int:
        """Size of q and k of one head (K)."""
        return self.key_dim // self.num_heads

    @property
    def head_v_dim(self) -> int:
        """Size of v of one head (V)."""
        return self.value_dim // self.num_heads

    @property
    def has_head_rotation(self) -> bool:
        """Whether each head has rotary frequencies of its own, `[H, K/2]` in a row."""
        return len(self.rotary_frequencies) > self.head_k_dim // 2

    def of_head(self, schedule: tuple[float, ...], head: int) -> tuple[float, ...]:
        """The K/2 numbers of `rotary_frequencies` or of `key_decay`, where there are any, that hold for a head."""
        pairs = self.head_k_dim // 2
        return schedule[head * pairs : (head + 1) * pairs] if len(schedule) > pairs else schedule

    @property
    def num_kv_heads(self) -> int:
        """Heads of k and v before they are repeated for their query heads."""
        return self.num_heads // self.num_kv_groups

    @property
    def has_vocabulary(self) -> bool:
        """Whether there is an embedding and a head: token ids in, logits out."""
        return self.vocab_size > 0

    def with_head_norm_eps(self, eps: float) -> RetNetConfig:
        """The same model with another head-norm epsilon."""
        return dataclasses.replace(self, head_norm=dataclasses.replace(self.head_norm, eps=eps))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that `from_dict` reads back exactly (floats round-trip through repr)."""
        data = dataclasses.asdict(self)
        return data | {name: list(data[name]) for name in _SCHEDULES}

    def identity(self) -> dict[str, Any]:
        """`to_dict` for hashes: a field that is younger than the hashes in use counts only where the model uses it."""
        return {name: value for name, value in self.to_dict().items() if name not in _YOUNGER or value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RetNetConfig:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: a field that is unknown, missing or of the wrong type, by name.
        """
        config: RetNetConfig = from_json(cls, data)
        return config


_SCHEDULES = ("decay", "key_decay", "rotary_frequencies")
_YOUNGER = ("parallel_residual", "shared_block_norm", "output_norm")
"""Fields that came after hashes of models were first kept; each is False or None where it is not used."""
