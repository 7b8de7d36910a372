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
        {"rotary_frequencies": (1.0,) * 8},
        {"rotary_frequencies": (1.0,) * 16, "num_kv_groups": 2},
        {"key_decay": (-0.1,) * 8},
        {"key_decay": (-0.1,) * 15 + (0.1,)},
        {"key_decay": (-0.1,) * 16},
        {"parallel_residual": True, "norm_order": "post"},
        {"parallel_residual": True, "norm_order": "branch"},
        {"parallel_residual": 1},
        {"shared_block_norm": True},
        {"output_norm": "rms"},
    ],
    ids=str,
)
def test_a_configuration_that_describes_no_model_is_refused_by_name(change: dict[str, Any]) -> None:
    name = {"key_dim": "head_k_dim", "num_heads": "heads"}
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
    assert config.head_k_dim == (160 if name == "300m" else 256)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"decay": "0000"}, "decay is '0000'; expected a list of finite numbers"),
        ({"decay": (-0.1,) * 4}, "decay is .*; expected a list"),
        ({"decay": 1}, "decay is 1"),
        ({"decay": [-0.1, -0.1, "0", -0.1]}, r"decay\[2\] is '0'; expected a finite number"),
        ({"key_decay": [[0.0]]}, r"key_decay\[0\]"),
        ({"rotary_frequencies": [None]}, r"rotary_frequencies\[0\] is None"),
        ({"rotary_frequencies": [10**400]}, r"rotary_frequencies\[0\]"),
        ({"block_norm": {"kind": "rms", "eps": "small"}}, r"block_norm\.eps is 'small'"),
        ({"block_norm": {"kind": "rms", "eps": math.nan}}, r"block_norm\.eps is nan; expected a finite number"),
        ({"head_norm": {"kind": "rms", "eps": math.inf}}, r"head_norm\.eps is inf"),
        ({"head_norm": {"kind": "rms", "eps": True}}, r"head_norm\.eps is True"),
        ({"head_norm": {"kind": "rms", "eps": 10**400}}, r"head_norm\.eps is 1000"),
        ({"head_norm": {"kind": ["rms"], "eps": 0.0}}, r"head_norm\.kind is \['rms'\]; expected one of rms"),
        ({"score_normalization": {"key_scale": 1.0, "by_decay": "no", "clamp": "none"}}, r"normalization\.by_decay"),
        ({"feed_forward": {"kind": "glu", "dim": 8.0, "activation": "silu"}}, r"feed_forward\.dim is 8\.0"),
        (
            {"feed_forward": {"kind": "plain", "dim": 8, "activation": "silu", "norm": {"kind": "rms", "eps": "x"}}},
            r"feed_forward\.norm\.eps is 'x'",
        ),
        ({"feed_forward": None}, "feed_forward is NoneType"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; expected true or false"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is None"),
        ({"final_norm": "no"}, "final_norm is 'no'"),
        ({"projection_bias": 1}, "projection_bias is 1"),
        ({"residual_alpha": 10**400}, "residual_alpha is 1000"),
        ({"embedding_scale": "1"}, "embedding_scale is '1'"),
        ({"num_heads": True}, "num_heads is True"),
        ({"vocab_size": 10**400}, r"vocab_size is 1000.*; expected a positive integer, below 2\^63"),
        ({"vocab_size": 61.0}, r"vocab_size is 61\.0; expected an integer"),
        ({"gate": 1}, "gate is 1; expected one of silu"),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        RetNetConfig.from_dict({**BASE.to_dict(), **change})


@pytest.mark.parametrize(
    "change", [{"final_norm": "no"}, {"decay": [-0.1] * 4}, {"gate": 1}, {"head_norm": None}, {"embedding_scale": "1"}]
)
def test_types_are_checked_at_construction_too(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(BASE, **change)


def test_a_key_decay_of_each_head_with_shared_key_heads_is_refused() -> None:
    config = replace(BASE, num_kv_groups=2, score_normalization=ScoreNormalization(0.5, False, "none"))
    with pytest.raises(ConfigError, match="key_decay of each head with shared key heads; expected head_k_dim / 2 = 4"):
        replace(config, key_decay=(-0.1,) * 16)
    assert replace(config, key_decay=(-0.1,) * 4).num_kv_heads == 2


def test_each_head_has_its_own_part_of_a_schedule_or_all_of_it() -> None:
    own = ABLATIONS["head_rotation"]
    assert own.has_head_rotation
    assert [theta for head in range(4) for theta in own.of_head(own.rotary_frequencies, head)] == list(
        own.rotary_frequencies
    )
    assert len(own.of_head(own.key_decay, 2)) == 4
    assert not BASE.has_head_rotation
    assert BASE.of_head(BASE.rotary_frequencies, 3) == BASE.rotary_frequencies
    assert BASE.of_head(BASE.key_decay, 3) == ()
    assert not ABLATIONS["one_head"].has_head_rotation


def test_fields_that_hashes_of_models_do_not_know_count_only_where_they_are_used() -> None:
    fields = {"parallel_residual": True, "shared_block_norm": True, "output_norm": BlockNorm("rms", 0.0)}
    assert set(BASE.to_dict()) - set(BASE.identity()) == set(fields)
    identities = [BASE.identity(), replace(BASE, **fields).identity()]
    identities += [replace(BASE, parallel_residual=True).identity(), ABLATIONS["output_norm"].identity()]
    assert len({json.dumps(identity) for identity in identities}) == 4


def test_whole_numbers_in_a_schedule_become_floats() -> None:
    config = RetNetConfig.from_dict({**BASE.to_dict(), "decay": [0] * 4})
    assert config.decay == (0.0,) * 4
    assert {type(g) for g in config.decay} == {float}
