"""Sizes of ONNX's types, held against onnx_ir's."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnx.external_data_helper import set_external_data

from retnet_tools.errors import InputError
from retnet_tools.graph.checking import check_graph
from retnet_tools.graph.contract import STEP_FILE, WEIGHTS_FILE

SIZED = {name: number for name, number in onnx.TensorProto.DataType.items() if name not in ("UNDEFINED", "STRING")}


def folder_of(tmp_path: Path, data_type: int, shape: list[int], length: int) -> Path:
    """A graph of one tensor, and as many bytes of weights.data as it says."""
    tensor = onnx.TensorProto(name="w", data_type=data_type, dims=shape, raw_data=b"")
    set_external_data(tensor, WEIGHTS_FILE, 0, length)
    tensor.ClearField("raw_data")
    model = onnx.ModelProto(
        graph=onnx.GraphProto(name="g", initializer=[tensor], output=[onnx.ValueInfoProto(name="w")])
    )
    (tmp_path / STEP_FILE).write_bytes(model.SerializeToString())
    (tmp_path / WEIGHTS_FILE).write_bytes(bytes(length))
    return tmp_path / STEP_FILE


@pytest.mark.parametrize("name", SIZED)
def test_a_tensor_of_every_type_is_as_long_as_its_bits(name: str, tmp_path: Path) -> None:
    bytes_of_five = -(-5 * ir.DataType[name].bitwidth // 8)
    check_graph(folder_of(tmp_path, SIZED[name], [5], bytes_of_five))
    with pytest.raises(
        InputError, match=f"gives 'w' {bytes_of_five + 1} bytes; expected {bytes_of_five}, by its shape"
    ):
        check_graph(folder_of(tmp_path, SIZED[name], [5], bytes_of_five + 1))


@pytest.mark.parametrize("data_type", [onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING, 99, -1])
def test_a_type_without_a_size_is_refused(data_type: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        check_graph(folder_of(tmp_path, data_type, [5], 5))


def test_a_graph_that_gives_nothing_is_refused(tmp_path: Path) -> None:
    """An empty file is one, to protobuf."""
    (tmp_path / STEP_FILE).write_bytes(b"")
    with pytest.raises(InputError, match="it gives nothing"):
        check_graph(tmp_path / STEP_FILE)
