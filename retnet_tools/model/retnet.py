"""The network of Eq. 8 and 9 in torch, for verification and training.

Shapes: B batch, T tokens, H heads, K head_k_dim, V head_v_dim, D hidden size. Module and parameter names are the
canonical tensor names of `retnet_tools.weights`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet_tools.config import Activation, HeadNorm, RetNetConfig
from retnet_tools.model.decay import decay_sums
from retnet_tools.model.retention import RetentionForm, retention_parallel
from retnet_tools.model.rotary import rotary_phases, rotate
from retnet_tools.weights import Array, WeightSource, canonical_shapes, check_weights

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


@dataclass(frozen=True)
class RetNetOutput:
    """Logits `[B, T, vocab]`, one state `[B, H, K, V]` a layer, and hidden states if they were asked for.

    `hidden_states[0]` is the embedding's output, `hidden_states[i + 1]` that of layer i; each `[B, T, D]`.
    """

    logits: Tensor
    states: list[Tensor]
    hidden_states: list[Tensor]


@dataclass(frozen=True)
class PositionTerms:
    """What a position contributes, the same for all layers: phases `[B, 1, T, K/2]` and 1/sqrt(sum gamma^i)."""

    cos: Tensor
    sin: Tensor
    score_scale: Tensor | None


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, accumulated in float32 (float64 for float64 input)."""

    def __init__(self, size: int, kind: str, eps: float, bias: bool) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., size]`; the result has the dtype of x."""
        y = normalize(_wide(x), self.kind, self.eps).to(x.dtype) * self.weight
        return y if self.bias is None else y + self.bias


class HeadNormalization(nn.Module):
    """GroupNorm_h of Eq. 8: each head's V values normalised on their own."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        self.norm: HeadNorm = config.head_norm
        self.head_shape = (config.num_heads, config.head_v_dim)
        size = {"none": 0, "shared": config.head_v_dim, "channel": config.value_dim}[self.norm.weight]
        self.weight = nn.Parameter(torch.ones(size)) if size else None
        self.bias = nn.Parameter(torch.zeros(size)) if self.norm.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each head of `[B, T, H, V]`."""
        y = normalize(x, self.norm.kind, self.norm.eps)  # x: [B, T, H, V]
        if self.weight is not None:
            y = y * self._per_head(self.weight)
        return y if self.bias is None else y + self._per_head(self.bias)

    def _per_head(self, parameter: Tensor) -> Tensor:
        return parameter.view(self.head_shape) if self.norm.weight == "channel" else parameter


class MultiScaleRetention(nn.Module):
    """MSR(X) = (act(X W_G) * GroupNorm_h(Retention(X, gamma_h))) W_O (Eq. 8)."""

    decay: Tensor

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        self.config = config
        d, bias = config.hidden_size, config.projection_bias
        self.q_proj = nn.Linear(d, config.key_dim, bias)
        self.k_proj = nn.Linear(d, config.key_dim, bias)
        self.v_proj = nn.Linear(d, config.value_dim, bias)
        self.gate_proj = nn.Linear(d, config.value_dim, bias) if config.gate is not None else None
        self.head_norm = HeadNormalization(config)
        self.out_proj = nn.Linear(config.value_dim, d, bias)

    def forward(
        self, x: Tensor, terms: PositionTerms, state: Tensor | None, form: RetentionForm
    ) -> tuple[Tensor, Tensor]:
        """Output `[B, T, D]` and state `[B, H, K, V]` for x `[B, T, D]`."""
        config = self.config
        q = rotate(self._heads(self.q_proj(x)), terms.cos, terms.sin)
        k = rotate(self._heads(self.k_proj(x)), terms.cos, terms.sin) * config.score_normalization.key_scale
        v = self._heads(self.v_proj(x))
        if terms.score_scale is not None:
            q = q * terms.score_scale
        decay = torch.tensor(config.decay, dtype=torch.float64, device=x.device)
        y, state = form(q, k, v, decay, initial_state=state, score_clamp=config.score_normalization.clamp)
        y = self.head_norm(y.transpose(1, 2)).flatten(-2).to(x.dtype)  # [B, H, T, V] -> [B, T, H*V]
        if self.gate_proj is not None:
            y = _activate(config.gate, self.gate_proj(x)) * y
        return self.out_proj(y), state

    def _heads(self, x: Tensor) -> Tensor:
        heads = x.view(*x.shape[:2], self.config.num_heads, -1).transpose(1, 2)  # [B, T, H*K] -> [B, H, T, K]
        return _wide(heads)


class FeedForwardNetwork(nn.Module):
    """FFN(X) = act(X W_1) W_2 (Eq. 9), or the gated down(act(gate x) * up x)."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        ffn = config.feed_forward
        self.activation: Activation = ffn.activation
        self.gate_proj = nn.Linear(config.hidden_size, ffn.dim, ffn.bias) if ffn.kind == "glu" else None
        self.up_proj = nn.Linear(config.hidden_size, ffn.dim, ffn.bias)
        self.norm = _block_norm(config, ffn.dim) if ffn.norm else None
        self.down_proj = nn.Linear(ffn.dim, config.hidden_size, ffn.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, D]` to `[B, T, D]`."""
        if self.gate_proj is not None:
            y = _activate(self.activation, self.gate_proj(x)) * self.up_proj(x)
        else:
            y = _activate(self.activation, self.up_proj(x))
        output: Tensor = self.down_proj(y if self.norm is None else self.norm(y))
        return output


class Layer(nn.Module):
    """Y = MSR(LN(X)) + X, X' = FFN(LN(Y)) + Y (Eq. 9); with `post`, X' = LN(alpha X + f(X)) (DeepNorm)."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        self.pre = config.norm_order == "pre"
        self.alpha = config.residual_alpha
        self.retention_norm = _block_norm(config, config.hidden_size)
        self.retention = MultiScaleRetention(config)
        self.ffn_norm = _block_norm(config, config.hidden_size)
        self.ffn = FeedForwardNetwork(config)

    def forward(
        self, x: Tensor, terms: PositionTerms, state: Tensor | None, form: RetentionForm
    ) -> tuple[Tensor, Tensor]:
        """Output `[B, T, D]` and state `[B, H, K, V]` for x `[B, T, D]`."""
        if self.pre:
            y, state = self.retention(self.retention_norm(x), terms, state, form)
            x = self.alpha * x + y
            return self.alpha * x + self.ffn(self.ffn_norm(x)), state
        y, state = self.retention(x, terms, state, form)
        x = self.retention_norm(self.alpha * x + y)
        return self.ffn_norm(self.alpha * x + self.ffn(x)), state


class RetNet(nn.Module):
    """A RetNet language model: embedding, layers, final norm, output projection.

    Runs in any torch float type. Retention itself, phases, decay and head norms run in float32 under half types and
    in float64 under float64; states have that type too.
    """

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_norm = _block_norm(config, config.hidden_size) if config.embedding_norm else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_norm = _block_norm(config, config.hidden_size) if config.final_norm else None
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    def forward(
        self,
        input_ids: Tensor,
        *,
        form: RetentionForm = retention_parallel,
        states: Sequence[Tensor] | None = None,
        position: int | Tensor = 0,
        keep_hidden: bool = False,
    ) -> RetNetOutput:
        """Run T tokens in one form.

        Args:
            input_ids: `[B, T]` int64.
            form: how retention is computed.
            states: one `[B, H, K, V]` a layer, from an earlier call; None starts from zero.
            position: position of the first token, one number or `[B]`; the states' position when there are states.
            keep_hidden: also return the hidden states of all layers.
        """
        x = self.embedding(input_ids) * self.config.embedding_scale
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        terms = self._position_terms(input_ids, position, x.dtype)
        hidden, new_states = [x], []
        for i, layer in enumerate(self.layers):
            x, state = layer(x, terms, None if states is None else states[i], form)
            new_states.append(state)
            if keep_hidden:
                hidden.append(x)
        if self.final_norm is not None:
            x = self.final_norm(x)
        logits = F.linear(x, self.embedding.weight if self.lm_head is None else self.lm_head.weight)
        return RetNetOutput(logits, new_states, hidden if keep_hidden else [])

    def _position_terms(self, input_ids: Tensor, position: int | Tensor, dtype: torch.dtype) -> PositionTerms:
        config, device = self.config, input_ids.device
        start = torch.as_tensor(position, device=device).view(-1, 1)
        positions = start + torch.arange(input_ids.shape[1], device=device)  # [B or 1, T]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        cos, sin = rotary_phases(positions, config.rotary_frequencies, wide)
        if not config.score_normalization.by_decay:
            return PositionTerms(cos, sin, None)
        decay = torch.tensor(config.decay, dtype=torch.float64, device=device)
        return PositionTerms(cos, sin, decay_sums(decay, positions, torch.float64).rsqrt().to(wide))


def normalize(x: Tensor, kind: str, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) (`rms`), the same of x - mean(x) (`layer`), or x (`none`), over the last dimension.

    A zero vector stays zero when eps is 0.
    """
    if kind == "none":
        return x
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + max(eps, torch.finfo(x.dtype).tiny))


def initialize(model: RetNet, seed: int) -> RetNet:
    """Fill with torchscale's initial distribution: Xavier with gain 2^-2.5 for q, k, v, gate; normal embeddings."""
    generator = torch.Generator().manual_seed(seed)
    d = model.config.hidden_size
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.startswith(("embedding.", "lm_head.")):
                parameter.normal_(0, d**-0.5, generator=generator)
            elif parameter.dim() == 2:
                gain = 2**-2.5 if ".retention." in name and "out_proj" not in name else 1.0
                bound = gain * math.sqrt(6 / sum(parameter.shape))
                parameter.uniform_(-bound, bound, generator=generator)
    return model


def load_model(config: RetNetConfig, source: WeightSource, dtype: torch.dtype) -> RetNet:
    """A model with the weights of a source, each converted to `dtype`.

    Memory: the model, plus one tensor.

    Raises:
        InputError: a tensor that is unknown, missing or of the wrong shape.
    """
    check_weights(config, source)
    with torch.device("meta"):
        model = RetNet(config)
    weights = {name: to_torch(source.read(name)).to(dtype) for name in canonical_shapes(config)}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def to_torch(array: Array) -> Tensor:
    """A numpy array as a torch tensor; bfloat16 passes through its bits."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _block_norm(config: RetNetConfig, size: int) -> Norm:
    norm = config.block_norm
    return Norm(size, norm.kind, norm.eps, norm.bias)


def _activate(activation: Activation | None, x: Tensor) -> Tensor:
    return x if activation is None else ACTIVATIONS[activation](x)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
