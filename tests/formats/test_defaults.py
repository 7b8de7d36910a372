"""What a configuration leaves out is what its project's own class would fill in.

The expected values stand in the public code: microsoft/torchscale `architecture/config.py` and
`examples/fairseq/models/retnet.py`, syncdoth/RetNet `configuration_retnet.py` at 2634bbf, at 77e8724^ (2 October 2023)
and at 770af37 (its first layout), syncdoth/RetNet-XATL `hf_retnet/configuration_retnet.py`, flash-linear-attention
`models/retnet/configuration_retnet.py`, fkodom/yet-another-retnet `retnet.py`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retnet_tools.config import RetNetConfig
from retnet_tools.formats import (
    fla,
    open_checkpoint,
    syncdoth,
    syncdoth_first,
    torchscale_tensors,
    xatl,
    yet_another_retnet,
)
from retnet_tools.formats.settings import Settings
from retnet_tools.formats.spec import Source
from retnet_tools.formats.storage import StoredTensors
from retnet_tools.model.retnet import ACTIVATIONS
from tests.formats.cases import SETTINGS, small_tensors, write_torchscale

PAPER_GAMMAS = [1 - 2.0 ** (-5 - h) for h in range(8)]
LANGUAGE_GAMMAS = [1 - np.exp(x) for x in np.linspace(np.log(1 / 32), np.log(1 / 512), 8)]


def told(name: str, **values: Any) -> Source:
    return Source(StoredTensors({}), Settings(name, values))


def of_syncdoth(heads: int, **values: Any) -> RetNetConfig:
    return syncdoth.resolve(told("syncdoth", decoder_retention_heads=heads, **values))


def sizes(config: RetNetConfig) -> tuple[int, ...]:
    """Vocabulary, hidden size, layers, heads, totals of q and v, feed-forward size."""
    totals = (config.key_dim, config.value_dim, config.feed_forward.dim)
    return (config.vocab_size, config.hidden_size, config.num_layers, config.num_heads, *totals)


def plain(config: RetNetConfig) -> tuple[Any, ...]:
    """Order of the norms, alpha, scale and norm of the embedding, whether it is tied, biases of projections."""
    around = (config.embedding_scale, config.embedding_norm, config.tie_word_embeddings)
    return (config.norm_order, config.residual_alpha, *around, config.projection_bias)


def test_syncdoth() -> None:
    config = of_syncdoth(4)  # its 1280 for v is no multiple of its 3 heads
    assert sizes(config) == (50257, 768, 12, 4, 768, 1280, 1280)
    assert of_syncdoth(3, decoder_value_embed_dim=1536).num_heads == 3
    assert plain(config) == ("pre", 1.0, 1.0, False, False, False)
    assert (config.feed_forward.kind, config.feed_forward.activation) == ("glu", "gelu")
    assert (config.block_norm.kind, config.block_norm.eps, config.head_norm.eps) == ("rms", 1e-6, 1e-6)


def test_syncdoth_of_2_october_2023() -> None:
    config = of_syncdoth(2, value_factor=2)
    assert sizes(config) == (50257, 768, 12, 2, 768, 1536, 1536)
    assert plain(config) == ("pre", 1.0, 1.0, False, False, True)
    assert (config.feed_forward.kind, config.feed_forward.activation) == ("plain", "gelu")
    assert (config.block_norm.kind, config.block_norm.eps, config.head_norm.eps) == ("layer", 1e-5, 1e-5)


def test_the_first_layout_of_syncdoth() -> None:
    config = syncdoth_first.resolve(told("syncdoth"))
    assert sizes(config) == (50257, 2048, 24, 8, 2048, 4096, 4096)
    assert (config.feed_forward.activation, config.feed_forward.bias, config.projection_bias) == ("gelu", True, False)
    assert (config.block_norm.eps, config.head_norm.eps, config.final_norm) == (1e-5, 1e-5, False)
    np.testing.assert_allclose(np.exp(config.decay), LANGUAGE_GAMMAS, rtol=1e-6)
    paper = syncdoth_first.resolve(told("syncdoth", use_default_gamma=True))
    np.testing.assert_allclose(np.exp(paper.decay), PAPER_GAMMAS, rtol=1e-6)


def test_xatl() -> None:
    source = told("xatl", decoder_retention_heads=4)
    config = xatl.resolve(source)
    assert sizes(config) == (50257, 768, 12, 4, 768, 1280, 1280)
    assert plain(config) == ("pre", 1.0, 1.0, False, False, False)
    assert (config.feed_forward.kind, config.feed_forward.activation) == ("glu", "gelu")
    assert (config.block_norm.kind, config.block_norm.eps, config.head_norm.weight) == ("rms", 1e-6, "none")
    assert (config.parallel_residual, config.shared_block_norm, config.head_bias) == (False, False, False)
    assert (config.score_normalization.by_decay, config.score_normalization.clamp) == (False, "none")
    assert min(config.rotary_frequencies) > 0
    np.testing.assert_allclose(np.exp(config.decay), PAPER_GAMMAS[:4], rtol=1e-6)
    assert source.notes == []
    scaled = xatl.resolve(told("xatl", decoder_value_embed_dim=768, no_scale_embedding=False))
    assert (scaled.num_heads, scaled.embedding_scale) == (3, 768**0.5)


def test_flash_linear_attention() -> None:
    config = fla.resolve(Settings("fla", {}))
    # 2/3 of twice the hidden size is 2730, of which the next multiple of 256 is 2816.
    assert sizes(config) == (32000, 2048, 24, 8, 2048, 4096, 2816)
    assert plain(config) == ("pre", 1.0, 1.0, False, False, False)
    assert (config.block_norm.eps, config.head_norm.eps, config.head_norm.weight) == (1e-6, 1e-6, "shared")
    assert (config.gate, config.feature_map, config.num_kv_groups) == ("silu", None, 1)


def test_yet_another_retnet() -> None:
    found = {"num_tokens": 31, "d_model": 16, "nhead": 2, "num_layers": 3, "dim_feedforward": 20}
    config = yet_another_retnet.resolve(Settings("yar", {}), found, (1.0,) * 4)
    assert sizes(config) == (31, 16, 3, 2, 16, 16, 20)
    assert (config.gate, config.feed_forward.activation, config.norm_order) == ("silu", "silu", "pre")
    assert (config.block_norm.eps, config.head_norm.eps) == (1e-6, 1e-6)


@pytest.mark.parametrize("biased", [False, True], ids=["rms", "layer"])
def test_torchscale_since_october_2023(biased: bool, tmp_path: Path) -> None:
    tensors = small_tensors()
    if biased:
        norms = {name: value for name, value in tensors.items() if "norm" in name}
        tensors |= {name.replace("weight", "bias"): value for name, value in norms.items()}
    told = {"layernorm_eps", "activation_fn", "no_scale_embedding", "decoder_normalize_before"}
    settings = {name: value for name, value in SETTINGS.items() if name not in told}
    config = open_checkpoint(write_torchscale(tmp_path, tensors, settings)).config
    assert (config.block_norm.kind, config.block_norm.eps) == ("layer" if biased else "rms", 1e-6)
    assert (config.feed_forward.activation, config.embedding_scale, config.norm_order) == ("gelu", 1.0, "pre")


def test_torchscale_trained_by_fairseq(tmp_path: Path) -> None:
    told = {"layernorm_eps", "activation_fn", "no_scale_embedding", "vocab_size"}
    namespace = argparse.Namespace(**{name: value for name, value in SETTINGS.items() if name not in told})
    state = {name: torch.from_numpy(value) for name, value in small_tensors("decoder.").items()}
    torch.save({"args": namespace, "model": state}, tmp_path / "checkpoint_best.pt")
    config = open_checkpoint(tmp_path).config
    assert (config.feed_forward.activation, config.embedding_scale) == ("silu", config.hidden_size**0.5)


X = np.linspace(-3, 3, 25)
TANH_GELU = X / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (X + 0.044715 * X**3)))
GELU = X / 2 * (1 + np.array([math.erf(x / 2**0.5) for x in X]))
WORDS = {
    **dict.fromkeys(("swish", "silu"), X / (1 + np.exp(-X))),
    **dict.fromkeys(("gelu", "gelu_python"), GELU),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), TANH_GELU),
    "relu": np.maximum(X, 0),
    "relu2": np.maximum(X, 0) ** 2,
    "leaky_relu": np.where(X < 0, 0.01 * X, X),
    "elu": np.where(X < 0, np.exp(X) - 1, X),
    "sigmoid": 1 / (1 + np.exp(-X)),
    "tanh": np.tanh(X),
}


@pytest.mark.parametrize("format", [fla, xatl, torchscale_tensors, yet_another_retnet], ids=lambda f: f.__name__[21:])
def test_words_of_activations_mean_what_transformers_says(format: Any) -> None:
    for word, activation in format.ACTIVATIONS.items():
        found = ACTIVATIONS[activation](torch.from_numpy(X)).numpy()
        np.testing.assert_allclose(found, WORDS[word], rtol=1e-12, atol=1e-15, err_msg=word)
