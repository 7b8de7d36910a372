"""Other configurations than the conformance cases, against flash-linear-attention's own code where it is installed.

It is no requirement of this project:

    pip install --no-deps flash-linear-attention fla-core triton transformers ...   (no GPU is needed)

Its model, layers and wiring run as they are; its Triton kernels are replaced by their definition in torch, since they
need a GPU and compute in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.formats.implementations import TOKENS, check, randomize
from tests.tolerances import GOLDEN_FLOAT64

models = pytest.importorskip("fla.models.retnet", reason="flash-linear-attention is not installed")


def rms(x: Tensor, module: nn.Module) -> Tensor:
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.eps)
    return y if module.weight is None else y * module.weight.to(y.dtype)


def rms_forward(self: nn.Module, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, *_: Any) -> Any:
    x = x if residual is None else x + residual
    return (rms(x, self), x) if prenorm else rms(x, self)


def plain_retention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, None]:
    heads, length = q.shape[2], q.shape[1]
    gamma = (1 - torch.tensor(2.0).pow(-5.0 - torch.arange(heads).float())).log().to(q.dtype)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    decay = torch.exp(gamma[:, None, None] * distance.clamp(min=0)) * (distance >= 0)
    scores = torch.einsum("bnhk,bmhk->bhnm", q * q.shape[-1] ** -0.5, k) * decay
    return torch.einsum("bhnm,bmhv->bnhv", scores, v), None


def rotated_halves(self: nn.Module, q: Tensor, k: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    phase = torch.outer(torch.arange(q.shape[1], dtype=torch.float64), self._compute_inv_freq().double())
    cos, sin = (f(phase)[None, :, None].to(q.dtype) for f in (torch.cos, torch.sin))

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    return turn(q), turn(k)


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> Any:
    from fla.layers import multiscale_retention
    from fla.modules import FusedRMSNormGated, RMSNorm, mlp, rotary

    monkeypatch.setattr(RMSNorm, "forward", rms_forward)
    monkeypatch.setattr(FusedRMSNormGated, "forward", lambda self, x, g, *_: rms(x, self) * F.silu(g))
    monkeypatch.setattr(rotary.RotaryEmbedding, "forward", rotated_halves)
    monkeypatch.setattr(multiscale_retention, "fused_recurrent_retention", plain_retention)
    monkeypatch.setattr(mlp, "swiglu", lambda gate, y: F.silu(gate) * y)
    monkeypatch.setattr(mlp, "swiglu_linear", lambda gate, y, weight, bias: F.linear(F.silu(gate) * y, weight, bias))
    return models


FEATURE_MAPS = ("relu", "gelu", "gelu_new", "silu", "tanh", "sigmoid", "relu2", "leaky_relu")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "elementwise_affine": False},
        {"use_output_gate": False},
        {"use_output_gate": False, "elementwise_affine": False, "fuse_norm": False},
        {"fuse_norm": False, "fuse_swiglu": False},
        {"tie_word_embeddings": True},
        {"expand_k": 0.5, "expand_v": 1.5},
        {"num_heads": 2, "hidden_size": 36, "norm_eps": 1e-3},
        {"intermediate_size": None, "hidden_ratio": None},
        {"use_short_conv": True},
        *({"feature_map": name, "num_kv_heads": 2} for name in FEATURE_MAPS),
    ],
    ids=str,
)
def test_flash_linear_attention(fla: Any, change: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24, "vocab_size": 31}
    config = fla.RetNetConfig(**{**sizes, "fuse_cross_entropy": False, **change})
    model = fla.RetNetForCausalLM(config).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.double()(TOKENS, use_cache=False).logits
    check(tmp_path, expected, torch.float64, GOLDEN_FLOAT64)
