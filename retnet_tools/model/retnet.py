"""The network of Eq. 8 and 9 in torch, for verification and training.

Shapes: B batch, T tokens, H heads, K head_k_dim, V head_v_dim, D hidden size. Module and parameter names are the
canonical tensor names of `retnet_tools.weights`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet_tools.config import Activation, RetNetConfig
from retnet_tools.model.norms import HeadNormalization, Norm, wide
from retnet_tools.model.position_terms import PositionTerms, log_decay, rotate, terms_at
from retnet_tools.model.retention import RetentionForm, retention_parallel
from retnet_tools.weights import Array, WeightSource, canonical_shapes, check_weights

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class RetNetOutput:
    """Logits `[B, T, vocab]`, one state `[B, H, K, V]` a layer, and hidden states if they were asked for.

    A stack without a head gives its last hidden states `[B, T, D]` as `logits`. `hidden_states[0]` is the embedding's
    output, `hidden_states[i + 1]` that of layer i; each `[B, T, D]`.
    """

    logits: Tensor
    states: list[Tensor]
    hidden_states: list[Tensor]


class MultiScaleRetention(nn.Module):
    """MSR(X) = (act(X W_G) * GroupNorm_h(Retention(X, gamma_h))) W_O (Eq. 8)."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        self.config = config
        d, bias = config.hidden_size, config.projection_bias
        self.q_proj = nn.Linear(d, config.key_dim, bias)
        self.k_proj = nn.Linear(d, config.num_kv_heads * config.head_k_dim, bias)
        self.v_proj = nn.Linear(d, config.num_kv_heads * config.head_v_dim, bias)
        self.gate_proj = nn.Linear(d, config.value_dim, bias) if config.gate is not None else None
        self.head_norm = HeadNormalization(config)
        self.out_proj = nn.Linear(config.value_dim, d, bias)

    def forward(
        self, x: Tensor, terms: PositionTerms, state: Tensor | None, form: RetentionForm
    ) -> tuple[Tensor, Tensor]:
        """Output `[B, T, D]` and state `[B, H, K, V]` for x `[B, T, D]`."""
        y, state = self.mix(x, terms, state, form)
        return self.out_proj(y), state

    def mix(self, x: Tensor, terms: PositionTerms, state: Tensor | None, form: RetentionForm) -> tuple[Tensor, Tensor]:
        """What W_O reads, act(X W_G) * GroupNorm_h(Retention(X)) `[B, T, H*V]`, and the state."""
        config, scores = self.config, self.config.score_normalization
        q, k = (_activate(config.feature_map, project(x)) for project in (self.q_proj, self.k_proj))
        q = rotate(_heads(q, config.head_k_dim), terms.cos, terms.sin)
        k = rotate(_heads(k, config.head_k_dim), terms.cos, terms.sin) * scores.key_scale
        v = _heads(self.v_proj(x), config.head_v_dim)
        k, v = (y.repeat_interleave(config.num_kv_groups, dim=1) for y in (k, v))
        if terms.score_scale is not None:
            q = q * terms.score_scale
        decay = log_decay(config, x.device)
        y, state = form(q, k, v, decay, initial_state=state, score_clamp=scores.clamp)
        y = self.head_norm(y.transpose(1, 2)).flatten(-2).to(x.dtype)  # [B, H, T, V] -> [B, T, H*V]
        if self.gate_proj is not None:
            y = _activate(config.gate, self.gate_proj(x)) * y
        return y, state


class FeedForwardNetwork(nn.Module):
    """FFN(X) = act(X W_1) W_2 (Eq. 9), or the gated down(act(gate x) * up x)."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        ffn = config.feed_forward
        self.activation: Activation = ffn.activation
        self.gate_proj = nn.Linear(config.hidden_size, ffn.dim, ffn.bias) if ffn.kind == "glu" else None
        self.up_proj = nn.Linear(config.hidden_size, ffn.dim, ffn.bias)
        self.norm = Norm(ffn.dim, ffn.norm) if ffn.norm is not None else None
        self.down_proj = nn.Linear(ffn.dim, config.hidden_size, ffn.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, D]` to `[B, T, D]`."""
        output: Tensor = self.down_proj(self.expand(x))
        return output

    def expand(self, x: Tensor) -> Tensor:
        """What the last projection reads, `[B, T, F]`."""
        if self.gate_proj is not None:
            y = _activate(self.activation, self.gate_proj(x)) * self.up_proj(x)
        else:
            y = _activate(self.activation, self.up_proj(x))
        normed: Tensor = y if self.norm is None else self.norm(y)
        return normed


class Layer(nn.Module):
    """Y = MSR(LN(X)) + X, X' = FFN(LN(Y)) + Y (Eq. 9).

    With `post`, X' = LN(alpha X + f(X)) for each block f (DeepNorm); with `branch`, X' = alpha X + LN(f(X)). With a
    parallel residual, X' = alpha X + MSR(LN_1 X) + FFN(LN_2 X), where LN_2 may be LN_1.
    """

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        self.order = config.norm_order
        self.alpha = config.residual_alpha
        self.parallel = config.parallel_residual
        self.retention_norm = Norm(config.hidden_size, config.block_norm)
        self.retention = MultiScaleRetention(config)
        self.ffn_norm = None if config.shared_block_norm else Norm(config.hidden_size, config.block_norm)
        self.ffn = FeedForwardNetwork(config)

    def forward(
        self, x: Tensor, terms: PositionTerms, state: Tensor | None, form: RetentionForm
    ) -> tuple[Tensor, Tensor]:
        """Output `[B, T, D]` and state `[B, H, K, V]` for x `[B, T, D]`."""
        y, state = self.retention(self.block_input(self.retention_norm, x), terms, state, form)
        total, norm = self.add(self.retention_norm, x, y), self.norm_of_ffn
        if self.parallel:
            return total + self.ffn(norm(x)), state
        return self.add(norm, total, self.ffn(self.block_input(norm, total))), state

    @property
    def norm_of_ffn(self) -> Norm:
        """The norm of the feed-forward block, which may be that of retention."""
        return self.retention_norm if self.ffn_norm is None else self.ffn_norm

    def block_input(self, norm: Norm, x: Tensor) -> Tensor:
        """What the block of this norm reads of the residual stream x."""
        y: Tensor = norm(x) if self.order == "pre" else x
        return y

    def add(self, norm: Norm, x: Tensor, y: Tensor) -> Tensor:
        """The residual stream x after the block of this norm gave y."""
        if self.order == "pre":
            total: Tensor = self.alpha * x + y
        elif self.order == "branch":
            total = self.alpha * x + norm(y)
        else:
            total = norm(self.alpha * x + y)
        return total


class RetNet(nn.Module):
    """A RetNet language model: embedding, layers, final norms, output projection; or a stack without first and last.

    Runs in any torch float type. Retention itself, phases, decay and head norms run in float32 under half types and
    in float64 under float64; states have that type too.
    """

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        self.config = config
        size, norm = config.hidden_size, config.block_norm
        # With a weight, since torch would import its compiler to draw one on the meta device: a second of work.
        table = torch.empty(config.vocab_size, size)
        self.embedding = nn.Embedding(config.vocab_size, size, _weight=table) if config.has_vocabulary else None
        self.embedding_norm = Norm(size, norm) if config.embedding_norm else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_norm = Norm(size, norm) if config.final_norm else None
        self.output_norm = Norm(size, config.output_norm) if config.output_norm is not None else None
        untied = config.has_vocabulary and not config.tie_word_embeddings
        self.lm_head = nn.Linear(size, config.vocab_size, config.head_bias) if untied else None

    def forward(
        self,
        inputs: Tensor,
        *,
        form: RetentionForm = retention_parallel,
        states: Sequence[Tensor] | None = None,
        position: int | Tensor = 0,
        keep_hidden: bool = False,
    ) -> RetNetOutput:
        """Run T tokens in one form.

        Args:
            inputs: token ids `[B, T]` int64; for a stack without an embedding, embeddings `[B, T, D]`.
            form: how retention is computed.
            states: one `[B, H, K, V]` a layer, from an earlier call; None starts from zero.
            position: position of the first token, one number or `[B]`; the states' position when there are states.
            keep_hidden: also return the hidden states of all layers.
        """
        x = self.embed(inputs)
        start = torch.as_tensor(position, device=inputs.device).view(-1, 1)
        terms = terms_at(self.config, start + torch.arange(inputs.shape[1], device=inputs.device), x.dtype)
        hidden, new_states = [x], []
        for i, layer in enumerate(self.layers):
            x, state = layer(x, terms, None if states is None else states[i], form)
            new_states.append(state)
            if keep_hidden:
                hidden.append(x)
        return RetNetOutput(self.head(x), new_states, hidden if keep_hidden else [])

    def head(self, x: Tensor) -> Tensor:
        """Logits of the last layer's output `[B, T, D]`; without an output head, its norm."""
        x = self.normed(x)
        if self.embedding is None:
            return x
        logits: Tensor = F.linear(x, self.embedding.weight) if self.lm_head is None else self.lm_head(x)
        return logits

    def normed(self, x: Tensor) -> Tensor:
        """What the output head reads of the last layer's output `[B, T, D]`."""
        for norm in (self.final_norm, self.output_norm):
            x = x if norm is None else norm(x)
        return x

    def embed(self, inputs: Tensor) -> Tensor:
        """What the first layer reads, `[B, T, D]`."""
        if self.embedding is None:
            x = inputs.to(next(self.parameters()).dtype)
        else:
            x = self.embedding(inputs) * self.config.embedding_scale
        return x if self.embedding_norm is None else self.embedding_norm(x)


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


def _heads(x: Tensor, size: int) -> Tensor:
    return wide(x.view(*x.shape[:2], -1, size).transpose(1, 2))  # [B, T, H*K] -> [B, H, T, K]


def _activate(activation: Activation | None, x: Tensor) -> Tensor:
    return x if activation is None else ACTIVATIONS[activation](x)
