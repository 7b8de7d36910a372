"""Each check of the weights: tensors that trigger it and tensors that do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from retnet_tools.evaluate import weight_lint
from retnet_tools.evaluate.lint import Finding
from retnet_tools.evaluate.weight_lint import lint_weights, scan
from retnet_tools.weights import Array
from tests.helpers import ABLATIONS, BASE, MemorySource, random_source

WEIGHT = "layers.1.ffn.up_proj.weight"
FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def found(tensors: dict[str, Array]) -> dict[str, Finding]:
    return {finding.check: finding for finding in lint_weights(MemorySource(tensors), lambda count: None)}


def damaged(*values: float, dtype: Any = np.float32, name: str = WEIGHT) -> dict[str, Array]:
    """The tensors of a random model, the first elements of one replaced."""
    tensors = random_source(BASE, 1, dtype).tensors
    tensors[name].reshape(-1)[: len(values)] = values
    return tensors


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["base", "torchscale_2023", "channel_head_norm"])
def test_a_random_model_has_no_findings(name: str, dtype: Any) -> None:
    assert found(random_source(ABLATIONS[name], 1, dtype).tensors) == {}


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinite_values_are_counted_and_named(dtype: Any) -> None:
    nan, inf = float("nan"), float("inf")
    findings = found(damaged(nan, inf, -inf, nan, nan, dtype=dtype))
    assert {check: f.severity for check, f in findings.items()} == {"nan": "error", "infinite": "error"}
    assert findings["nan"].where == findings["infinite"].where == (WEIGHT,)
    assert findings["nan"].message.startswith("3 values NaN in ")
    assert findings["infinite"].message.startswith("2 values infinite in ")


def test_the_largest_float16_is_saturated_in_float16_alone() -> None:
    values = (65504, -65504, 65472)
    finding = found(damaged(*values, dtype=np.float16))["float16-saturated"]
    assert (finding.severity, finding.where) == ("warning", (WEIGHT,))
    assert finding.message.startswith("2 values ")
    assert found(damaged(*values, dtype=np.float32)) == {}
    assert found(damaged(65472, -65472, dtype=np.float16)) == {}


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.float64])
def test_values_beyond_float16_are_worth_knowing(dtype: Any) -> None:
    finding = found(damaged(65536, -1e6, 3e38, 60000, dtype=dtype))["beyond-float16"]
    assert (finding.severity, finding.where) == ("info", (WEIGHT,))
    assert finding.message.startswith("3 values ")
    assert found(damaged(60000, dtype=dtype)) == {}
    assert found(damaged(-1e6, dtype=dtype))["beyond-float16"].message.startswith("1 value ")


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_constant_weight_is_a_warning_and_a_constant_bias_is_not(value: float) -> None:
    tensors = random_source(ABLATIONS["torchscale_2023"], 1).tensors
    tensors["layers.0.ffn.up_proj.bias"][:] = value
    assert found(tensors) == {}
    tensors[WEIGHT][:] = value
    tensors["layers.1.retention_norm.weight"][:] = 0.5
    finding = found(tensors)["constant"]
    assert finding.severity == "warning"
    assert set(finding.where) == {WEIGHT, "layers.1.retention_norm.weight"}


def test_a_tensor_of_one_element_is_not_constant() -> None:
    assert not scan(np.ones(1, np.float32)).constant
    assert not scan(np.ones(0, np.float32)).constant
    assert scan(np.ones(2, np.float32)).constant


def test_norms_that_are_one_are_told_apart_from_norms_that_are_all_one() -> None:
    tensors = random_source(BASE, 1).tensors
    tensors["final_norm.weight"][:] = 1
    finding = found(tensors)["norms-are-one"]
    assert (finding.severity, finding.where) == ("info", ("final_norm.weight",))
    assert "1 of 5" in finding.message
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor[:] = 1
    findings = found(tensors)
    assert list(findings) == ["norms-are-one"]
    assert findings["norms-are-one"].severity == "warning"


def test_an_untied_head_equal_to_the_embedding_is_worth_knowing() -> None:
    tensors = random_source(BASE, 1).tensors
    tensors["lm_head.weight"] = tensors["embedding.weight"].copy()
    finding = found(tensors)["untied-duplicate"]
    assert finding.severity == "info"
    tensors["lm_head.weight"][-1, -1] = np.nextafter(tensors["lm_head.weight"][-1, -1], np.float32(9))
    assert found(tensors) == {}
    assert found(random_source(replace(BASE, tie_word_embeddings=True), 1).tensors) == {}


def test_equal_bytes_of_another_type_are_no_duplicate() -> None:
    tensors = random_source(BASE, 1, np.float16).tensors
    tensors["lm_head.weight"] = tensors["embedding.weight"].view(ml_dtypes.bfloat16)
    assert "untied-duplicate" not in found(tensors)


def test_a_scan_in_blocks_equals_a_scan_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(3).standard_normal(1000).astype(np.float16)
    array[[5, 500, 999]] = np.nan, np.inf, 65504
    array[100:200] = np.nan
    whole = scan(array)
    monkeypatch.setattr(weight_lint, "_BLOCK", 10)
    assert scan(array) == whole
    assert whole.counts == {"nan": 101, "infinite": 1, "float16-saturated": 1, "beyond-float16": 0}
    assert (whole.low, whole.high) == (float(np.nanmin(array)), 65504.0)


def test_quantized_tensors_are_passed_over_and_progress_counts_every_byte() -> None:
    tensors = {"packed.weight": np.zeros((8, 4), np.uint8), "scales": np.arange(8, dtype=np.float32)}
    seen: list[int] = []
    assert lint_weights(MemorySource(tensors), seen.append) == []
    assert seen == [32, 32]
