"""Hostile exports: the manifest, the graphs, the weights, and saved states."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto
from safetensors import deserialize
from safetensors.numpy import save

from tests.hostile.changes import (
    HUGE,
    LONG,
    MISSING,
    cut,
    document,
    edited,
    fields,
    in_place_of,
    put_at,
    raw_json,
    replaced,
    with_header,
)
from tests.hostile.judge import Case
from tests.hostile.material import Special
from tests.hostile.tensor_cases import ESCAPES

MANIFEST, STEP, DECODER, WEIGHTS, STATE = "retnet.json", "step.onnx", "decoder.onnx", "weights.data", "a.state"
TEXTS = (MISSING, None, 7, [], "no such")
BOMB = ("(a+)+$", "(a|a)*b", ".*" * 20, "a?" * 30, "(" * 5000, "x" * 300, "[", "a{99999999999}")
QUANTIZATION = {"scheme": {"type": "int4", "block_size": 32}, "float_bytes": 100, "weight_bytes": 50}


def manifest_cases() -> Iterator[Case]:
    yield from raw_json("export", MANIFEST)
    rows: list[tuple[tuple[Any, ...], Any]] = [
        (("schema_version",), (MISSING, None, 0, 2, "1", True, 1.0)),
        (("dtype",), TEXTS),
        (("state_dtype",), TEXTS),
        (("ops",), TEXTS),
        (("device",), TEXTS[1:]),
        (("opset",), (None, 0, 22, 27, 28, HUGE, "23", [], True, 23.5)),
        (("config",), (MISSING, None, [], {}, 7)),
        (("graphs",), (MISSING, None, [], 7, {"step.onnx": {}}, {"step.onnx": None})),
        (("tokenizer_files",), (MISSING, 7, [7], [None], "ab/c")),
        (("provenance",), (MISSING, None, [], {}, {"source_files": 7}, {"source_files": [{"sha256": 7}]})),
        (("quantization",), (7, [], {}, {"scheme": None})),
        (("config", "num_layers"), (-1, 0, HUGE, 1 << 30, 2.0, True, "2", None, MISSING)),
        (("config", "num_heads"), (0, HUGE, 3)),
        (("config", "hidden_size"), (-32, HUGE, 10**30)),
        (("config", "key_dim"), (0, 33, HUGE)),
        (("config", "value_dim"), (0, 1.0, HUGE)),
        (("config", "vocab_size"), (-1, HUGE)),
        (("config", "decay"), ([], [0.1] * 4, [-1e400] * 4, ["a"] * 4, [None] * 4, [True] * 4, 7, [-1.0] * 100_000)),
        (("config", "rotary_frequencies"), ([], [[1.0]] * 4, "abcd")),
        (("config", "head_norm"), (None, {}, {"kind": "rms", "eps": -1.0})),
        (("config", "no_such_field"), (1,)),
        (("graphs", STEP, "inputs"), (None, 7, [7], [{}], MISSING)),
        (("graphs", STEP, "inputs", 0, "shape"), (None, 7, [-1, 1], [1.5], [[1]], [True])),
        (("graphs", STEP, "inputs", 0, "name"), (None, 7)),
    ]
    yield from fields("export", MANIFEST, MANIFEST, rows)
    others = [(("config", name), (1 << 20,)) for name in ("hidden_size", "vocab_size", "value_dim")]
    yield from fields("export", MANIFEST, "as its manifest says", others)
    for name in ESCAPES:
        change = document(MANIFEST, lambda d, n=name: d["graphs"].update({n: d["graphs"][STEP]}))
        yield Case("doctor", f"a graph {name[:30]!r}", change, MANIFEST)
        change = document(MANIFEST, lambda d, n=name: d["tokenizer_files"].append(n))
        yield Case("export", f"a file of the tokenizer {name[:30]!r}", change, MANIFEST)
    record = {"bytes": 1, "sha256": "0" * 64}
    records: list[Any] = [
        7,
        [],
        {STEP: 7},
        {STEP: {}},
        {STEP: record},
        {STEP: record | {"bytes": -1}},
        {"../x": record},
    ]
    records += [{STEP: record | {field: value}} for field in record for value in (None, True, 1.5, [])]
    for files in records:
        yield Case("export", f"files = {files}", document(MANIFEST, lambda d, f=files: d.update(files=f)), "")
    for pattern in BOMB:
        scheme = QUANTIZATION["scheme"] | {"exclude": [pattern]}  # type: ignore[operator]
        change = document(MANIFEST, lambda d, s=scheme: d.update(quantization=QUANTIZATION | {"scheme": s}))
        yield Case("export", f"the pattern {pattern[:20]!r}", change, "pattern")
    calibration = {"text": "a", "sha256": "b", "tokens": 3}
    for field, values in {
        "tokens": (0, -1, HUGE * 2, 1.5, True, "3"),
        "text": (7, None, ["a"]),
        "sha256": (7,),
    }.items():
        for value in values:
            record = QUANTIZATION | {"calibration": calibration | {field: value}}
            change = document(MANIFEST, lambda d, r=record: d.update(quantization=r))
            yield Case("export", f"calibration.{field} = {value!r}", change, f"calibration.{field}")
    bad = b'{"a": "\xff"}'
    yield Case(
        "export", "generation_config.json in Latin 1", replaced("generation_config.json", bad), "generation_config"
    )
    yield from in_place_of("export", MANIFEST, STEP, "prefill.onnx", WEIGHTS)


def graph_cases() -> Iterator[Case]:
    for kind in ("export", "run", "doctor"):
        yield from _of_graphs(kind)


def _of_graphs(kind: str) -> Iterator[Case]:
    # What runs on the CPU is one graph.
    graph = DECODER if kind == "run" else STEP

    def case(name: str, change: Callable[[onnx.ModelProto], None], says: str = graph) -> Case:
        def apply(data: bytes) -> bytes:
            model = onnx.load_from_string(data)
            change(model)
            return model.SerializeToString()

        return Case(kind, name, edited(graph, apply), says)

    def stored(model: onnx.ModelProto) -> TensorProto:
        return next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL and len(t.dims) == 2)

    def placed(**values: str) -> Callable[[onnx.ModelProto], None]:
        def change(model: onnx.ModelProto) -> None:
            entries = {entry.key: entry for entry in stored(model).external_data}
            for key, value in values.items():
                entries[key].value = value

        return change

    def shaped(*dims: int) -> Callable[[onnx.ModelProto], None]:
        return lambda model: stored(model).dims.__setitem__(slice(None), list(dims))

    for location in (
        "../weights.data",
        "/etc/passwd",
        "other.data",
        "a/weights.data",
        "",
        ".",
        "./weights.data",
        "x\0y",
    ):
        yield case(f"data in {location!r}", placed(location=location))
    for offset in ("-4096", str(HUGE), "9" * 30, "a", "1.5", "", "0x10"):
        yield case(f"data at {offset!r}", placed(offset=offset), "")
    for length in ("-1", "0", str(HUGE), "a", "4"):
        yield case(f"data of {length!r} bytes", placed(length=length))
    for dims in ((-1, 4), (0, 4), (HUGE, 4), (1 << 32, 1 << 32), (1 << 62,) * 30, (), (1,) * 100):
        yield case(f"a shape {str(dims)[:30]}", shaped(*dims))
    for number in (0, 8, 99, -1, 14):
        yield case(f"a type {number}", lambda model, n=number: setattr(stored(model), "data_type", n))
    yield case("no place", lambda model: stored(model).ClearField("external_data"))
    yield case("a place twice", lambda model: void(stored(model).external_data.add(key="location", value=WEIGHTS)))
    change = edited(graph, lambda data: data.replace(b"input_ids", b"input\xff\xfes"))
    yield Case(kind, "a name that is not UTF-8", change, graph)
    yield case("functions", lambda model: void(model.functions.add(name="f", domain="d")))
    yield case("300,000 nodes", lambda model: void([model.graph.node.add() for _ in range(300_000)]))
    if kind == "run":  # what only onnxruntime finds
        yield case("another input", lambda model: setattr(model.graph.input[0], "name", "ids"))
        yield case("an unknown operator", lambda model: setattr(model.graph.node[0], "op_type", "NoSuch"))
        yield case("an unknown domain", lambda model: setattr(model.graph.node[0], "domain", "evil"))
        yield case("no outputs", lambda model: model.graph.ClearField("output"))
        yield case("no nodes", lambda model: model.graph.ClearField("node"))
        yield case("an opset to come", lambda model: setattr(model.opset_import[0], "version", 9999))
        yield case("a value that nothing makes", lambda model: model.graph.node[0].input.__setitem__(0, "nothing"))
        yield case("a node twice", lambda model: void(model.graph.node.append(model.graph.node[0])))
        return

    for at in (0, 1, 10, 0.5, -1):
        change = cut(graph, at)
        yield Case(kind, f"{graph} cut at {at}", change, graph if at else "")
        change = cut(WEIGHTS, at)
        yield Case(kind, f"weights.data cut at {at}", change, WEIGHTS)
    for name, content in {
        "text": b"hello",
        "5 MB of empty nodes": b"\x08\x0b\x3a\x80\x80\xc0\x02" + b"\x0a\x00" * (5 << 19),
        "endless groups": b"\x0b" * 100_000,
        "graphs in graphs": nested(300),
        "a length of 2^63": b"\x3a" + b"\xff" * 8 + b"\x7f",
        "a field of 4 GB": b"\x3a\xff\xff\xff\xff\x0f",
    }.items():
        yield Case(kind, f"{graph} is {name}", replaced(graph, content), graph)
    yield Case(kind, "no weights.data", lambda files: void(files.pop(WEIGHTS)), WEIGHTS)
    yield Case(kind, f"no {graph}", lambda files: void(files.pop(graph)), graph)


def nested(levels: int) -> bytes:
    """A graph that holds a node that holds a graph, and so on."""
    content = b""
    for field in (b"\x32", b"\x2a", b"\x0a") * levels:  # graph of an attribute, attribute, node
        size, length = len(content), b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        content = field + length + bytes([size]) + content
    return b"\x08\x0b\x3a" + content


def void(_: object) -> None:
    """For what takes something out."""


def state_cases() -> Iterator[Case]:
    def case(name: str, change: Any, says: str | None = None) -> Case:
        return Case("state", name, change, STATE if says is None else says)

    def tensors(change: Callable[[dict[str, Any]], None]) -> Callable[[Any], None]:
        def apply(data: bytes) -> bytes:
            types = {"F32": np.float32, "I64": np.int64, "BOOL": np.bool_}
            arrays = {
                name: np.frombuffer(entry["data"], types[entry["dtype"]]).reshape(entry["shape"]).copy()
                for name, entry in deserialize(data)
            }
            change(arrays)
            length = int.from_bytes(data[:8], "little")
            return save(arrays, json.loads(data[8 : 8 + length])["__metadata__"])

        return edited(STATE, apply)

    def meta(name: str, value: Any) -> Case:
        def change(content: dict[str, Any]) -> None:
            put_at("__metadata__", name)(content, value)

        return case(f"{name} {'missing' if value is MISSING else str(value)[:140]}", with_header(STATE, change))

    def stream(**values: Any) -> str:
        state = {"bit_generator": "PCG64", "state": {"state": 1, "inc": 1}, "has_uint32": 0, "uinteger": 0}
        return json.dumps([state | values, state])

    for at in (0, 4, 8, 100, 0.5, -1):
        yield case(f"cut at {at}", cut(STATE, at))
    yield case("more after its end", edited(STATE, lambda data: data + b"\0"))
    for tensor in ("position", "logits", "seen", "layers.0.recurrent_state", "layers.1.recurrent_state"):
        yield case(f"no {tensor}", tensors(lambda arrays, n=tensor: void(arrays.pop(n))))
    yield case("a tensor too many", tensors(lambda arrays: arrays.update(other=np.zeros(2))))
    yield case(
        "a layer too many", tensors(lambda a: a.update({"layers.2.recurrent_state": a["layers.0.recurrent_state"]}))
    )
    yield case(
        "layers.07", tensors(lambda a: a.update({"layers.07.recurrent_state": a.pop("layers.1.recurrent_state")}))
    )
    for position in ([-1, 3], [0, 3], [3, HUGE], [3, (1 << 24) + 1], [3, -HUGE]):
        yield case(f"positions {position}", tensors(lambda a, p=position: a.update(position=np.array(p))))
    shapes = {"position": [(), (2, 1), (3,), (0,)], "logits": [(), (2,), (2, 60), (2, 0), (3, 61)]}
    shapes |= {
        "seen": [(2, 60), (2,), (1, 61)],
        "layers.0.recurrent_state": [(2, 4, 8), (1, 4, 8, 12), (2, 4, 8, 13), (0, 4, 8, 12)],
    }
    for name, found in shapes.items():
        for shape in found:
            yield case(f"{name} of {shape}", tensors(lambda a, n=name, s=shape: a.update({n: np.zeros(s, a[n].dtype)})))
    for tensor, dtype in {"position": "f8", "logits": "f8", "seen": "u1", "layers.0.recurrent_state": "i4"}.items():
        yield case(f"{tensor} as {dtype}", tensors(lambda a, n=tensor, t=dtype: a.update({n: a[n].astype(t)})))
    for value in (np.nan, np.inf, -np.inf):
        for tensor in ("logits", "layers.1.recurrent_state"):
            yield case(f"{value} in {tensor}", tensors(lambda a, n=tensor, v=value: a[n].flat.__setitem__(5, v)))
    for key, values in {
        "format": (MISSING, "pt", ""),
        "schema_version": (MISSING, "2", "1.0", ""),
        "fingerprint": (MISSING, "", "{", "[]", "null", "7", '{"model": 7}', '{"a": "b", "a": "c"}', "[" * 100_000),
        "token_hashes": (MISSING, "{}", "[]", '["00", "00"]', '["zz", "zz"]', "[1, 2]", '["' + "0" * 64 + '"]', "null"),
        "sampling": (
            *(
                MISSING,
                "[]",
                "null",
                '{"heat": 1}',
                '{"temperature": -1}',
                '{"temperature": NaN}',
                '{"temperature": 1e999}',
            ),
            *('{"temperature": "1"}', '{"temperature": true}', '{"top_k": 1.5}', '{"top_p": 2}', '{"seed": -1}'),
            *('{"steps": ["x"]}', '{"seed": true}', '{"temperature": 1' + "0" * 400 + "}", '{"min_p": 1, "min_p": 0}'),
            *('{"seed": ' + LONG + "}", '{"repetition_penalty": 0}'),
        ),
        "streams": (
            *(MISSING, "[]", "{}", "[{}, {}]", "[1, 2]", "null", stream(bit_generator="MT19937"), stream(state=None)),
            *(
                stream(state={"state": -1, "inc": 1}),
                stream(state={"state": 1 << 200, "inc": 1}),
                stream(has_uint32="a"),
            ),
            *(stream(uinteger=1 << 80), stream(state={"state": 1.5, "inc": 1}), stream(state={"state": "1", "inc": 1})),
        ),
    }.items():
        for value in values:
            yield meta(key, value)
    yield Case("state", "a state of another model", with_header(STATE, _other_model), "model")
    yield Case("state", "a sparse file of 4 TB", replaced(STATE, Special("sparse", str(4 << 40))), STATE)
    yield from in_place_of("state", STATE)


def _other_model(content: dict[str, Any]) -> None:
    fingerprint = json.loads(content["__metadata__"]["fingerprint"]) | {"model": "0" * 64}
    content["__metadata__"]["fingerprint"] = json.dumps(fingerprint)
