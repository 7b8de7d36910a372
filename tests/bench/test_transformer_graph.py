"""The Transformer that RetNet is measured against is one: its logits are those of full attention without a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retnet_tools.bench.models import Precision, write_transformer
from retnet_tools.bench.transformer_graph import (
    TOTAL_LENGTH,
    TransformerConfig,
    matching_transformer,
    parameters,
    transformer_shapes,
)
from retnet_tools.bench.transformer_session import TransformerSession
from retnet_tools.errors import UsageError
from retnet_tools.graph.quantization import Scheme
from retnet_tools.paper import MODEL_SIZES, paper_config
from retnet_tools.quantize.blockwise import dequantize_rows, quantize_rows
from retnet_tools.random_weights import RandomWeights
from retnet_tools.runtime.buffers import Binding
from retnet_tools.runtime.providers import Device
from retnet_tools.weights import canonical_shapes
from tests.bench.transformer_reference import CONFIG, transformer_logits
from tests.helpers import BASE, MemorySource
from tests.tolerances import GRAPH_FLOAT16, GRAPH_FLOAT32

CONFIGS = {
    "heads": CONFIG,
    "shared heads": replace(CONFIG, num_kv_heads=2),
    "one shared head": replace(CONFIG, num_kv_heads=1),
    "tied": replace(CONFIG, tie_word_embeddings=True),
    "silu": replace(CONFIG, activation="silu"),
}
FLOAT = Precision("float32", None, "fused")


def session(config: TransformerConfig, folder: Path, precision: Precision = FLOAT) -> TransformerSession:
    write_transformer(config, precision, folder)
    return TransformerSession(folder, config, precision.dtype, Device("cpu"), 1)


def ids(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 61, (batch, length))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("prompt", [1, 9])
def test_prompt_and_steps_with_a_cache_equal_full_attention(name: str, prompt: int, tmp_path: Path) -> None:
    config, tokens = CONFIGS[name], ids(3, 24)
    expected = transformer_logits(config, RandomWeights(transformer_shapes(config)), tokens)
    assert 1 < np.abs(expected).max() < 20
    model = session(config, tmp_path / "out")
    cache = model.new_cache(3, 24)
    steps = [tokens[:, :prompt], *(tokens[:, n : n + 1] for n in range(prompt, 24))]
    for n, step in enumerate(steps):
        logits = model.run(step, cache)
        np.testing.assert_allclose(logits, expected[:, prompt - 1 + n], rtol=0, atol=GRAPH_FLOAT32)
    assert cache.tokens == 24


def test_the_cache_is_written_where_it_lies_and_only_where_tokens_are(tmp_path: Path) -> None:
    model = session(CONFIG, tmp_path / "out")
    cache = model.new_cache(2, 16, fill=lambda shape: np.full(shape, 7.0))
    model.run(ids(2, 5), cache)
    for buffer in cache.buffers:
        values = buffer.read()
        assert values.shape == (2, 4, 16, 16)
        assert (values[:, :, 5:] == 7).all()
        assert (values[:, :, :5] != 7).any()


def test_one_row_goes_on_with_several_tokens_and_several_rows_do_not(tmp_path: Path) -> None:
    tokens, model = ids(2, 12), session(CONFIG, tmp_path / "out")
    expected = transformer_logits(CONFIG, RandomWeights(transformer_shapes(CONFIG)), tokens)
    cache = model.new_cache(1, 12)
    model.run(tokens[:1, :7], cache)
    np.testing.assert_allclose(model.run(tokens[:1, 7:], cache)[0], expected[0, -1], rtol=0, atol=GRAPH_FLOAT32)
    several = model.new_cache(2, 12)
    model.run(tokens[:, :7], several)
    with pytest.raises(UsageError, match="one row"):
        model.run(tokens[:, 7:], several)


def test_a_full_cache_and_more_room_than_positions_are_refused(tmp_path: Path) -> None:
    model = session(CONFIG, tmp_path / "out")
    with pytest.raises(UsageError, match="5 tokens in a cache; expected at most 4"):
        model.run(ids(1, 5), model.new_cache(1, 4))
    with pytest.raises(UsageError, match="65 tokens in a cache"):
        model.new_cache(1, 65)


def test_float16_is_close(tmp_path: Path) -> None:
    tokens = ids(2, 10)
    expected = transformer_logits(CONFIG, RandomWeights(transformer_shapes(CONFIG)), tokens)
    model = session(CONFIG, tmp_path / "out", Precision("float16", None, "fused"))
    logits = model.run(tokens, model.new_cache(2, 10))
    np.testing.assert_allclose(logits, expected[:, -1], rtol=0, atol=GRAPH_FLOAT16)


@pytest.mark.parametrize("name", ["heads", "tied"])
def test_quantized_weights_are_those_of_round_to_nearest(name: str, tmp_path: Path) -> None:
    config, scheme = CONFIGS[name], Scheme("int8", 32, accuracy_level=0)
    shapes, tokens = transformer_shapes(config), ids(2, 10)
    source = RandomWeights(shapes)
    rounded = {}
    for weight, shape in shapes.items():
        format, values = scheme.format_of(weight), source.read(weight)
        assert format is not None
        rows = quantize_rows(values, format, np.dtype(np.float32)) if len(shape) == 2 else None
        rounded[weight] = values if rows is None else dequantize_rows(rows, format)
    expected = transformer_logits(config, MemorySource(rounded), tokens)
    model = session(config, tmp_path / "out", Precision("float32", scheme, "fused"))
    logits = model.run(tokens, model.new_cache(2, 10))
    np.testing.assert_allclose(logits, expected[:, -1], rtol=0, atol=GRAPH_FLOAT32)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("size", MODEL_SIZES)
def test_it_has_as_many_parameters_as_retnet(size: str, groups: int) -> None:
    retnet = MODEL_SIZES[size].config(50257)
    config = matching_transformer(retnet, kv_groups=groups, max_positions=512)
    assert (config.hidden_size, config.num_layers) == (retnet.hidden_size, retnet.num_layers)
    assert config.num_heads == groups * config.num_kv_heads
    ratio = parameters(transformer_shapes(config)) / parameters(canonical_shapes(retnet))
    assert abs(ratio - 1) < 0.02
    assert config.head_size in (32, 64, 128)


def test_a_retnet_without_a_match_is_refused() -> None:
    with pytest.raises(UsageError, match="without embedding"):
        matching_transformer(replace(BASE, vocab_size=0), max_positions=8)
    odd = paper_config(vocab_size=50, hidden_size=72, value_dim=96, ffn_dim=64, num_layers=1, num_heads=4)
    with pytest.raises(UsageError, match="a multiple of 16"):
        matching_transformer(odd, max_positions=8)
    small = paper_config(vocab_size=50, hidden_size=64, value_dim=16, ffn_dim=8, num_layers=1, num_heads=4)
    with pytest.raises(UsageError, match="no Transformer of width 64"):
        matching_transformer(small, max_positions=8)


@pytest.mark.parametrize("name", ["heads", "shared heads"])
def test_a_step_may_be_told_the_room_in_place_of_the_length(name: str, tmp_path: Path, monkeypatch) -> None:
    """As a captured CUDA graph is, whose sizes stay: each row ends where seqlens_k says."""
    config, tokens = CONFIGS[name], ids(2, 12)
    expected = transformer_logits(config, RandomWeights(transformer_shapes(config)), tokens)
    model = session(config, tmp_path / "out")
    cache = model.new_cache(2, 24, fill=lambda shape: np.full(shape, 7.0))
    model.run(tokens[:, :5], cache)
    lengths = []
    run = Binding.run

    def noted(self: Binding, feeds, *, fetch: bool):
        lengths.append(int(feeds[TOTAL_LENGTH]))
        return run(self, feeds, fetch=fetch)

    monkeypatch.setattr(Binding, "run", noted)
    monkeypatch.setattr(model, "eager_reason", None)
    for n in range(5, 12):
        logits = model.run(tokens[:, n : n + 1], cache)
        np.testing.assert_allclose(logits, expected[:, n], rtol=0, atol=GRAPH_FLOAT32)
    assert lengths == [24] * 7
