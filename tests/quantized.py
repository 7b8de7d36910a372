"""Quantized folders, and their weights decoded from the files by what the operators' documents say, apart from the
package."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_model

from retnet_tools.config import RetNetConfig
from retnet_tools.graph.export import plan_of_export
from retnet_tools.quantize.options import QuantizeOptions
from retnet_tools.quantize.steps import plan_quantized, write_quantized
from retnet_tools.weights import Array, canonical_shapes
from tests.helpers import MemorySource

MERGED = {
    "retention.qkvg_proj": [f"retention.{part}_proj" for part in ("q", "k", "v", "gate")],
    "ffn.gate_up_proj": ["ffn.gate_proj", "ffn.up_proj"],
}


def quantize(folder: Path, out: Path, kind: str, **options: Any) -> Path:
    """Quantize an exported folder to another and return that."""
    plan = plan_quantized(plan_of_export(folder), QuantizeOptions(kind, **options))
    write_quantized(plan, out, force=False)
    return out


def decoded_source(config: RetNetConfig, graph: Path) -> MemorySource:
    """The weights of a graph as float64 by canonical name, quantized ones decoded."""
    model = onnx.load(graph, load_external_data=False)
    external = [t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    load_external_data_for_model(model, str(graph.parent))
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    named = {name: arrays[name].astype(np.float64) for name in external if "." in name}
    for node in model.graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "MatMulNBits":
            shape = (attributes["N"], attributes["K"])
            named[_base(node.input[1])] = _nbits([arrays[n] for n in node.input[1:4] if n], shape, attributes)
        elif node.op_type == "GatherBlockQuantized":
            parts = [arrays[node.input[i]] for i in (0, 2, *range(3, len(node.input)))]
            named[_base(node.input[0])] = _nbits(parts, (parts[0].shape[0], config.hidden_size), attributes)
        elif node.op_type == "DequantizeLinear" and all(n in arrays for n in node.input):
            codes, scales, *zeros = (arrays[n].astype(np.float64) for n in node.input)
            size, rows = attributes["block_size"], len(codes)
            steps = codes - (np.repeat(zeros[0], size, 0)[:rows] if zeros else 0)
            named[_base(node.input[0])] = (steps * np.repeat(scales, size, 0)[:rows]).T
    if "embedding.weight.scales" in arrays and "embedding.weight" not in named:
        named["embedding.weight"] = _embedding_by_columns(config, arrays)
    return MemorySource(_split(config, named))


def _base(name: str) -> str:
    return name.removesuffix(".view").removesuffix(".codes")


def _embedding_by_columns(config: RetNetConfig, arrays: dict[str, Array]) -> Array:
    """An embedding `[vocab, D]` that standard graphs look up in codes stored as `[D, vocab]`: int8 or uint8, or bytes
    of two codes each, signed where there is no zero point."""
    codes, scales = arrays["embedding.weight.codes"], arrays["embedding.weight.scales"].astype(np.float64)
    zeros, shape = arrays.get("embedding.weight.zero_points"), (config.hidden_size, config.vocab_size)

    def integers(array: Array, rows: int) -> Array:
        if array.ndim == 2:
            return array.astype(np.float64)
        unpacked = _bits(array[None], 4)[0, : rows * shape[1]].reshape(rows, -1)
        return np.where(unpacked > 7, unpacked - 16, unpacked) if zeros is None else unpacked

    size = next(size for size in (32, 64, 128) if -(-shape[0] // size) == len(scales))
    steps = integers(codes, shape[0])
    if zeros is not None:
        steps = steps - np.repeat(integers(zeros, len(scales)), size, 0)[: shape[0]]
    return (steps * np.repeat(scales, size, 0)[: shape[0]]).T


def _nbits(parts: list[Array], shape: tuple[int, int], attributes: dict[str, Any]) -> Array:
    """(code - zero_point) * scale as MatMulNBits documents its inputs: low bits first."""
    bits, size = attributes["bits"], attributes["block_size"]
    codes, scales, *rest = parts
    codes = _bits(codes.reshape(shape[0], -1), bits)[:, : shape[1]]
    zeros = _bits(rest[0], bits)[:, : scales.shape[1]] if rest else np.full(scales.shape, 2.0 ** (bits - 1))
    spread = [np.repeat(x, size, 1)[:, : shape[1]].astype(np.float64) for x in (zeros, scales)]
    return (codes - spread[0]) * spread[1]


def _bits(packed: Array, bits: int) -> Array:
    unpacked = np.unpackbits(packed, axis=1, bitorder="little").reshape(len(packed), -1, bits)
    return (unpacked * 2.0 ** np.arange(bits)).sum(-1)


def _split(config: RetNetConfig, named: dict[str, Array]) -> dict[str, Array]:
    shapes, tensors = canonical_shapes(config), {}
    for name, array in named.items():
        stem, _, kind = name.rpartition(".")
        layer, module = ".".join(stem.split(".")[:2]), ".".join(stem.split(".")[2:])
        parts = [f"{layer}.{part}.{kind}" for part in MERGED[module]] if module in MERGED else [name]
        parts = [part for part in parts if part in shapes]
        edges = [0, *itertools.accumulate(shapes[part][0] for part in parts)]
        for part, (start, end) in zip(parts, itertools.pairwise(edges), strict=True):
            tensors[part] = array[start:end]
    return {name: tensors[name] for name in shapes if name in tensors}
