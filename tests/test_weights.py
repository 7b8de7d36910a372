from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

from retnet_tools.errors import InputError
from retnet_tools.model.retnet import RetNet
from retnet_tools.weights import (
    Array,
    CountedWeights,
    FiniteWeights,
    TensorInfo,
    canonical_shapes,
    check_weights,
    is_floating,
)
from tests.helpers import ABLATIONS, BASE, MemorySource, random_source


@pytest.mark.parametrize("name", ABLATIONS)
def test_canonical_shapes_are_the_parameters_of_the_model(name: str) -> None:
    parameters = {key: tuple(p.shape) for key, p in RetNet(ABLATIONS[name]).named_parameters()}
    assert canonical_shapes(ABLATIONS[name]) == parameters


def test_complete_weights_pass() -> None:
    check_weights(BASE, random_source(BASE, seed=0))


def test_unknown_missing_misshapen_and_integer_tensors_are_named() -> None:
    tensors = random_source(BASE, seed=0).tensors
    name = "layers.1.ffn.down_proj.weight"
    wrong = {
        "unknown tensor 'extra'": {**tensors, "extra": np.zeros(1)},
        f"no tensor '{name}'": {key: value for key, value in tensors.items() if key != name},
        rf"'{name}' has shape \[40, 32\]; expected \[32, 40\]": {**tensors, name: tensors[name].T},
        f"'{name}' is int64": {**tensors, name: tensors[name].astype(np.int64)},
    }
    for match, changed in wrong.items():
        with pytest.raises(InputError, match=match) as caught:
            check_weights(BASE, MemorySource(changed))
        assert caught.value.exit_code == 5


def test_sizes_in_bytes_do_not_overflow() -> None:
    assert TensorInfo((1 << 20, 1 << 20), np.dtype(ml_dtypes.bfloat16)).nbytes == 1 << 41


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_float_types_may_be_weights(dtype: type) -> None:
    assert is_floating(np.dtype(dtype))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_tensors_that_are_not_finite_are_refused_when_read(dtype: type) -> None:
    bad = np.array([1, np.nan, -np.inf, np.inf], dtype)
    source = FiniteWeights(MemorySource({"good": np.ones(3, dtype), "bad": bad}))
    assert list(source.names()) == ["good", "bad"]
    assert source.info("bad") == TensorInfo((4,), np.dtype(dtype))
    np.testing.assert_array_equal(source.read("good"), np.ones(3, dtype))
    with pytest.raises(InputError, match="tensor 'bad' holds 3 NaN or infinite values; expected finite weights"):
        source.read("bad")


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.bool_, np.complex64, ml_dtypes.float8_e4m3fn])
def test_other_types_may_not(dtype: type) -> None:
    assert not is_floating(np.dtype(dtype))


def test_values_that_are_no_numbers_are_counted_by_tensor_over_its_blocks() -> None:
    class Blocks(MemorySource):
        def blocks(self, name: str) -> Iterator[Array]:
            yield from np.array_split(self.tensors[name], 3)

    tensors = {f"t{i}": np.arange(12, dtype=np.float32).reshape(6, 2) for i in range(12)}
    for i in range(10):
        for row, value in [(0, np.nan), (2, np.inf), (5, -np.inf)][: 1 + i % 3]:
            tensors[f"t{i}"][row, 1] = value
    counted = CountedWeights(Blocks(tensors))
    assert counted.notes() == ()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(np.concatenate(list(counted.blocks(name))), tensor)
    assert counted.wrong == {f"t{i}": 1 + i % 3 for i in range(10)}
    named = ", ".join(f"t{i} ({1 + i % 3})" for i in range(8))
    assert counted.notes() == (f"NaN or infinite weights in {named} and 2 more: all that they reach is NaN",)
