"""An exported folder read back: every tensor where it was written, and refusals of what does not fit."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_model, set_external_data

from retnet_tools.errors import InputError
from retnet_tools.graph.contract import PREFILL_FILE, STEP_FILE, WEIGHTS_FILE
from retnet_tools.graph.folder import read_graphs
from tests.exports import export
from tests.helpers import BASE, random_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export(BASE, random_source(BASE, 4), tmp_path / "out")


def edit(folder: Path, name: str, **changes: object) -> None:
    """Rewrite a tensor's place in step.onnx."""
    model = onnx.load(folder / STEP_FILE, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    tensor.raw_data = b""
    offset, length = int(place["offset"]), int(place["length"])
    set_external_data(tensor, **{"location": WEIGHTS_FILE, "offset": offset, "length": length, **changes})
    tensor.ClearField("raw_data")
    (folder / STEP_FILE).write_bytes(model.SerializeToString())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("ops", ["fused", "standard"])
def test_tensors_and_nodes_are_those_that_onnx_itself_reads(dtype: str, ops: str, tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 4), tmp_path / "out", ops=ops, dtype=dtype)
    graphs = read_graphs(folder, [STEP_FILE])
    model = onnx.load(folder / STEP_FILE, load_external_data=False)
    external = [t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    load_external_data_for_model(model, str(folder))
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name in external}
    assert sorted(graphs.tensors.names()) == sorted(stored)
    for name, array in stored.items():
        read = graphs.tensors.read(name)
        assert read.dtype.name == array.dtype.name
        assert read.shape == array.shape
        assert read.tobytes() == array.tobytes()
    counts = Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in model.graph.node)
    assert graphs.node_counts == {STEP_FILE: counts}


def test_a_tensor_that_two_graphs_share_is_listed_once(folder: Path) -> None:
    graphs = read_graphs(folder, [STEP_FILE, PREFILL_FILE])
    assert list(graphs.node_counts) == [STEP_FILE, PREFILL_FILE]
    assert sorted(graphs.tensors.names()) == sorted(read_graphs(folder, [STEP_FILE]).tensors.names())
    edit(folder, "embedding.weight", offset=4096)
    with pytest.raises(InputError, match=r"places 'embedding\.weight' elsewhere"):
        read_graphs(folder, [STEP_FILE, PREFILL_FILE])


def test_types_below_a_byte_are_read_as_their_bytes(tmp_path: Path) -> None:
    tensor = onnx.TensorProto(name="packed", data_type=onnx.TensorProto.INT4, dims=[3, 5])
    tensor.raw_data = b""
    set_external_data(tensor, WEIGHTS_FILE, 2, 8)
    tensor.ClearField("raw_data")
    graph = onnx.helper.make_graph([], "g", [], [onnx.ValueInfoProto(name="packed")], [tensor])
    (tmp_path / STEP_FILE).write_bytes(onnx.helper.make_model(graph).SerializeToString())
    (tmp_path / WEIGHTS_FILE).write_bytes(bytes(range(10)))
    np.testing.assert_array_equal(read_graphs(tmp_path, [STEP_FILE]).tensors.read("packed"), range(2, 10))


@pytest.mark.parametrize("location", ["../weights.data", "/etc/passwd", "other.data"])
def test_data_elsewhere_is_refused(folder: Path, location: str) -> None:
    edit(folder, "embedding.weight", location=location)
    with pytest.raises(InputError, match="beside it"):
        read_graphs(folder, [STEP_FILE])


def test_a_length_that_does_not_fit_the_shape_is_refused(folder: Path) -> None:
    edit(folder, "embedding.weight", length=4)
    with pytest.raises(InputError, match=f"4 bytes; expected {61 * 32 * 4}"):
        read_graphs(folder, [STEP_FILE])


def test_weights_that_are_missing_or_cut_are_refused(folder: Path) -> None:
    weights = folder / WEIGHTS_FILE
    os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(InputError, match="as its graphs say"):
        read_graphs(folder, [STEP_FILE])
    weights.unlink()
    with pytest.raises(InputError, match=r"no weights\.data"):
        read_graphs(folder, [STEP_FILE])


def test_a_graph_that_is_missing_broken_or_outside_is_refused(folder: Path) -> None:
    (folder / PREFILL_FILE).unlink()
    for name in (PREFILL_FILE, "../out/step.onnx"):
        with pytest.raises(InputError, match=f"no {name}"):
            read_graphs(folder, [name])
    (folder / STEP_FILE).write_bytes(b"not a graph")
    with pytest.raises(InputError, match="cannot be read"):
        read_graphs(folder, [STEP_FILE])
