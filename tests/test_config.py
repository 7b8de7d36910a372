from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retnet_tools.config import BlockNorm, FeedForward, HeadNorm, RetNetConfig, ScoreNormalization
from retnet_tools.errors import ConfigError
from retnet_tools.paper import MODEL_SIZES, paper_decay, paper_rotary_frequencies
from tests.helpers import ABLATIONS, BASE


@pytest.mark.parametrize("name", ABLATIONS)
def test_dict_round_trip_through_json_is_exact(name: str) -> None:
    config = ABLATIONS[name]
    assert RetNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(
    decay=st.lists(st.floats(-10, 0), min_size=4, max_size=4),
    frequencies=st.lists(st.floats(-10, 10), min_size=4, max_size=4),
    eps=st.floats(0, 1),
)
def test_floats_round_trip_bit_for_bit(decay: list[float], frequencies: list[float], eps: float) -> None:
    config = replace(BASE, decay=tuple(decay), rotary_frequencies=tuple(frequencies)).with_head_norm_eps(eps)
    assert RetNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": -1},
        {"num_kv_groups": 3},
        {"num_kv_groups": 0},
        {"key_decay": (-0.1,)},
        {"key_decay": (0.1,) * 4},
        {"key_decay": (-0.1,) * 4},
        {"feature_map": "softmax"},
        {"head_bias": True, "tie_word_embeddings": True},
        {"vocab_size": 0, "embedding_scale": 2.0},
        {"vocab_size": 0, "embedding_norm": True},
        {"vocab_size": 0, "tie_word_embeddings": True},
        {"vocab_size": 0, "head_bias": True},
        {"hidden_size": -1},
        {"num_layers": True},
        {"num_layers": 2.0},
        {"num_heads": 3},
        {"value_dim": 50},
        {"key_dim": 4},
        {"decay": (-0.1,) * 3},
        {"decay": (0.1,) * 4},
        {"decay": (math.nan,) * 4},
        {"rotary_frequencies": (1.0,)},
        {"rotary_frequencies": (math.inf,) * 4},
        {"gate": "maxout"},
        {"norm_order": "middle"},
        {"residual_alpha": 0.0},
        {"embedding_scale": math.inf},
    ],
    ids=str,
)
def test_a_configuration_that_describes_no_model_is_refused_by_name(change: dict[str, Any]) -> None:
    name = {"key_dim": "head_k_dim", "rotary_frequencies": "rotary frequencies", "num_heads": "heads"}
    name["key_decay"] = "key.decay"
    field = next(iter(change))
    with pytest.raises(ConfigError, match=name.get(field, field)) as caught:
        replace(BASE, **change)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: ScoreNormalization(1.0, True, "max"), r"score_normalization\.clamp"),
        (lambda: ScoreNormalization(0.0, True, "none"), r"score_normalization\.key_scale"),
        (lambda: HeadNorm("group", 0.0), r"head_norm\.kind"),
        (lambda: HeadNorm("rms", -1.0), r"head_norm\.eps"),
        (lambda: HeadNorm("rms", 0.0, "each"), r"head_norm\.weight"),
        (lambda: HeadNorm("rms", 0.0, bias=True), r"head_norm\.bias"),
        (lambda: HeadNorm("none", 0.0, "shared"), r"head_norm\.weight"),
        (lambda: BlockNorm("batch", 0.0), r"block_norm\.kind"),
        (lambda: BlockNorm("rms", -1.0), r"block_norm\.eps"),
        (lambda: FeedForward("moe", 4, "gelu"), r"feed_forward\.kind"),
        (lambda: FeedForward("glu", 4, "maxout"), r"feed_forward\.activation"),
        (lambda: FeedForward("glu", 0, "gelu"), r"feed_forward\.dim"),
    ],
)
def test_parts_are_checked_at_construction(build: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build()


@pytest.mark.parametrize("part", [None, "head_norm", "block_norm", "feed_forward", "score_normalization"])
def test_unknown_and_missing_fields_are_named(part: str | None) -> None:
    data = BASE.to_dict()
    inner = data if part is None else data[part]
    inner["dropout"] = 0.1
    with pytest.raises(ConfigError, match="unknown field 'dropout'"):
        RetNetConfig.from_dict(data)
    del inner["dropout"]
    required = next(iter(inner))
    del inner[required]
    with pytest.raises(ConfigError, match=f"no field '{required}'"):
        RetNetConfig.from_dict(data)


def test_paper_schedules_are_those_of_the_official_code() -> None:
    for h, log_gamma in enumerate(paper_decay(16)):
        assert math.exp(log_gamma) == pytest.approx(1 - 2.0 ** (-5 - h), rel=1e-15)
    frequencies = paper_rotary_frequencies(256)
    assert frequencies[0] == 1.0
    assert frequencies[-1] == pytest.approx(1e-4, rel=1e-14)
    assert len(frequencies) == 128


@pytest.mark.parametrize("name", MODEL_SIZES)
def test_published_sizes_make_valid_configurations(name: str) -> None:
    config = MODEL_SIZES[name].config(vocab_size=50257)
    assert config.head_k_dim == 256


@pytest.mark.parametrize(
    "change",
    [
        {"decay": "text"},
        {"key_decay": [[0.0]]},
        {"decay": 1},
        {"rotary_frequencies": [None]},
        {"block_norm": {"kind": "rms", "eps": "small"}},
    ],
    ids=str,
)
def test_fields_of_the_wrong_type_are_one_error(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="wrong type"):
        RetNetConfig.from_dict({**BASE.to_dict(), **change})
