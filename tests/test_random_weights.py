"""Random weights are what they say, the same each time, whole or in blocks, and never equal to one another."""

from __future__ import annotations

import tracemalloc

import numpy as np

from retnet_tools.paper import MODEL_SIZES
from retnet_tools.random_weights import RandomWeights, noise
from retnet_tools.weights import canonical_shapes

SHAPES = {
    "embedding.weight": (3000, 2048),
    "layers.0.out_proj.weight": (2048, 1024),
    "layers.1.out_proj.weight": (2048, 1024),
    "layers.0.norm.weight": (2048,),
    "layers.0.norm.bias": (2048,),
}


def test_a_tensor_is_the_same_whole_and_in_blocks() -> None:
    source = RandomWeights(SHAPES)
    for name, shape in SHAPES.items():
        whole = source.read(name)
        assert (whole.shape, whole.dtype) == (shape, np.dtype(np.float32))
        assert (source.info(name).shape, source.info(name).dtype) == (shape, np.dtype(np.float32))
        blocks = list(source.blocks(name))
        assert all(block.nbytes <= 16 << 20 for block in blocks)
        np.testing.assert_array_equal(np.concatenate(blocks), whole)
        np.testing.assert_array_equal(RandomWeights(SHAPES).read(name), whole)


def test_matrices_keep_the_size_of_what_they_map_and_norms_are_near_one() -> None:
    source = RandomWeights(SHAPES)
    matrix = source.read("embedding.weight")
    assert abs(float(matrix.std()) * np.sqrt(2048) - 1) < 0.01
    assert abs(float(matrix.mean())) < 1e-3
    assert abs(float(source.read("layers.0.norm.weight").mean()) - 1) < 0.02
    assert abs(float(source.read("layers.0.norm.bias").mean())) < 0.02


def test_no_two_tensors_and_no_two_rows_are_equal() -> None:
    # ONNX Runtime keeps equal weights once, and a model of equal layers would run from the cache.
    shapes = canonical_shapes(MODEL_SIZES["base"].config(5000))
    source = RandomWeights(shapes)
    beginnings = {tuple(source.read(name).flat[:8]) for name in shapes}
    assert len(beginnings) == len(shapes)
    rows = source.read("lm_head.weight")[:, :8]
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_memory_of_blocks_does_not_grow_with_the_tensor() -> None:
    source = RandomWeights({"large.weight": (100_000, 1024)})
    noise((1,))
    tracemalloc.start()
    for _ in zip(source.blocks("large.weight"), range(4), strict=False):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 << 20


def test_noise_begins_where_it_is_told_to() -> None:
    np.testing.assert_array_equal(noise((10,), start=3)[:5], noise((8,))[3:])
