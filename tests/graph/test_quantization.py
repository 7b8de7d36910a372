"""What retnet.json says about quantized weights: round trip through JSON, and refusals by field."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace

import pytest

from retnet_tools.errors import ConfigError
from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.graph.quantization import (
    Calibration,
    HalfScheme,
    MatrixSensitivity,
    MixedPrecision,
    Quality,
    Quantization,
    Scheme,
    TensorRule,
)

SCHEME = Scheme("int4", 32, symmetric=False, method="gptq", exclude=("norm",), tensor_types=(TensorRule("q", "int8"),))
FULL = Quantization(
    scheme=SCHEME,
    float_bytes=1000,
    weight_bytes=200,
    calibration=Calibration("plays.txt", "ab" * 32, 4096, 512, 3, "ef" * 32),
    quality=Quality("held.txt", "cd" * 32, 512, 12.5, 12.0, 0.03, 0.9),
    mixed_precision=MixedPrecision(
        None, 5.0, Calibration("plays.txt", "ab" * 32, 512), 0.5, 0.4, (MatrixSensitivity(("a", "b"), "int4", 0.1),)
    ),
    coarse_blocks=2,
)
HALF = Quantization(HalfScheme("bfloat16"), 9, 4)


@pytest.mark.parametrize("record", [FULL, Quantization(Scheme("int8", 128, accuracy_level=None), 9, 3), HALF])
def test_a_record_survives_json(record: Quantization) -> None:
    assert Quantization.from_dict(json.loads(json.dumps(record.to_dict()))) == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scheme": {"type": "int3"}},
            "quantization.scheme.type is 'int3'; expected one of int8, int4, float16, bfloat16",
        ),
        ({"scheme": {"type": "float16"}}, "quantization.scheme has unknown field 'accuracy_level'"),
        ({"scheme": 3}, "quantization.scheme is int; expected an object"),
        ({"mixed_precision": {"sensitivities": [{"type": "int4"}]}}, "sensitivities[0] has no field 'matrices'"),
        ({"scheme": {"block_size": 48}}, "block_size is 48; expected one of 32, 64, 128"),
        ({"scheme": {"block_size": 32.0}}, "block_size is 32.0"),
        ({"scheme": {"accuracy_level": True}}, "accuracy_level is True; expected one of 0, 1, 4"),
        ({"scheme": {"symmetric": 1}}, "symmetric is 1; expected true or false"),
        ({"scheme": {"exclude": "norm"}}, "exclude is 'norm'; expected a list of texts"),
        ({"scheme": {"exclude": [3]}}, "exclude[0] is 3; expected text"),
        ({"scheme": {"exclude": ["("]}}, "pattern '('"),
        ({"scheme": {"tensor_types": [{"pattern": "q", "type": "int2"}]}}, "tensor_types[0].type is 'int2'"),
        ({"scheme": {"groups": 3}}, "unknown field 'groups'"),
        ({"weight_bytes": 0}, "quantization.weight_bytes is 0"),
        ({"quality": {"mean_kl": "low"}}, "quality.mean_kl is 'low'; expected a finite number"),
        ({"colour": 3}, "unknown field 'colour'"),
    ],
)
def test_wrong_fields_are_refused_by_name(change: dict, message: str) -> None:
    data = json.loads(json.dumps(FULL.to_dict()))
    for name, value in change.items():
        data[name] = {**data[name], **value} if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=re.escape(message)):
        Quantization.from_dict(data)


def test_missing_fields_are_refused_by_name() -> None:
    data = FULL.to_dict()
    del data["float_bytes"]
    with pytest.raises(ConfigError, match="no field 'float_bytes'"):
        Quantization.from_dict(data)


def test_a_record_of_before_seeds_were_written_down_reads_and_keeps_its_fingerprint() -> None:
    old = {
        "scheme": {"type": "int4", "block_size": 64, "symmetric": True, "accuracy_level": 4, "method": "gptq"},
        "float_bytes": 1000,
        "weight_bytes": 200,
        "calibration": {"text": "plays.txt", "sha256": "ab" * 32, "tokens": 4096},
        "quality": None,
    }
    old["scheme"] |= {"exclude": [], "tensor_types": []}
    record = Quantization.from_dict(old)
    assert (record.calibration.seed, record.mixed_precision, record.coarse_blocks) == (None, None, 0)
    expected = hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()[:12]
    assert record.fingerprint() == f"int4 by gptq ({expected})"


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"calibration": replace(FULL.calibration, seed=4)}, False),
        ({"calibration": replace(FULL.calibration, sequence=256)}, False),
        ({"calibration": replace(FULL.calibration, ids_sha256="00" * 32)}, False),
        ({"quality": None}, True),
        ({"mixed_precision": None}, True),
        ({"coarse_blocks": 0}, True),
    ],
)
def test_the_fingerprint_says_what_decided_the_codes(change: dict, same: bool) -> None:
    assert (replace(FULL, **change).fingerprint() == FULL.fingerprint()) == same


def test_floats_have_no_fingerprint_of_their_own() -> None:
    assert HALF.fingerprint() == "none"
    assert HALF.blocks is None
    assert FULL.blocks == SCHEME


def test_exclusion_goes_before_rules_and_the_last_rule_wins() -> None:
    rules = (TensorRule(r"layers\.0\.", "int8"), TensorRule(r"v_proj", "int4"))
    scheme = Scheme("int4", 64, exclude=("lm_head",), tensor_types=rules)
    assert scheme.format_of("lm_head.weight") is None
    assert scheme.format_of("layers.0.retention.q_proj.weight") == BlockFormat(8, 64, True)
    assert scheme.format_of("layers.0.retention.v_proj.weight") == BlockFormat(4, 64, True)
    assert scheme.format_of("layers.10.retention.q_proj.weight") == BlockFormat(4, 64, True)


@pytest.mark.parametrize(("columns", "blocks"), [(1, 1), (32, 1), (33, 2), (64, 2)])
def test_a_short_last_block_counts(columns: int, blocks: int) -> None:
    assert BlockFormat(4, 32, True).blocks(columns) == blocks
