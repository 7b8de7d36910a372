"""Other configurations than the conformance cases, against the implementations' own code where it is installed.

They are no requirement of this project:

    pip install --no-deps yet-another-retnet einops
    pip install --no-deps flash-linear-attention fla-core triton transformers ...   (no GPU is needed)

flash-linear-attention's model, layers and wiring run as they are; its Triton kernels are replaced by their definition
in torch, since they need a GPU and compute in float32.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet_tools.formats import open_checkpoint
from retnet_tools.model.retention import FORMS
from retnet_tools.model.retnet import load_model
from tests.tolerances import GOLDEN_FLOAT32, GOLDEN_FLOAT64

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 31, (2, 19)))


def randomize(model: nn.Module) -> None:
    """Weights of unit gain, norm weights around 1, biases of 0.1: nothing that a test could miss."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.2 * noise)


def check(folder: Path, expected: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint.config, checkpoint.weights, dtype)
    for form in FORMS.values():
        with torch.no_grad():
            torch.testing.assert_close(model(TOKENS, form=form).logits, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("heads", "norm_first", "activation"),
    [*itertools.product([1, 4], [True, False], ["swish", "gelu"]), (2, False, "relu")],
)
def test_yet_another_retnet(heads: int, norm_first: bool, activation: str, dtype: torch.dtype, tmp_path: Path) -> None:
    package = pytest.importorskip("yet_another_retnet.retnet", reason="yet-another-retnet is not installed")
    arguments = {"d_model": heads * 8, "nhead": heads, "num_layers": 2, "dim_feedforward": 24, "layer_norm_eps": 1e-4}
    arguments |= {"num_tokens": 31, "norm_first": norm_first, "activation": activation}
    model = package.RetNet(**arguments).eval()
    randomize(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    (tmp_path / "args.json").write_text(json.dumps(arguments))
    with torch.no_grad():
        expected = model.to(dtype).forward_parallel(TOKENS)
    check(tmp_path, expected, dtype, GOLDEN_FLOAT64 if dtype == torch.float64 else GOLDEN_FLOAT32)


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
    models = pytest.importorskip("fla.models.retnet", reason="flash-linear-attention is not installed")
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
