"""Hostile safetensors files, indices of shards, DCP checkpoints and configurations."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from tests.hostile.changes import (
    DEEP,
    HUGE,
    LONG,
    MISSING,
    document,
    edited,
    fields,
    header,
    in_place_of,
    little,
    raw_json,
    replaced,
    with_header,
)
from tests.hostile.judge import Case
from tests.hostile.material import Special, repickled

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ESCAPES = (
    *("../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "C:\\model.safetensors", "a\\b", "C:x"),
    *("x\0y", "a" * 300, "//host/share", "./model-1.safetensors"),
)


def safetensors_cases() -> Iterator[Case]:
    def case(name: str, change: Any, says: str = FILE) -> Case:
        return Case("safetensors", name, change, says)

    def cut(name: str, place: Any) -> Case:
        return case(f"cut {name}", edited(FILE, lambda data: data[: place(data)]))

    def size(data: bytes) -> int:
        return 8 + struct.unpack("<Q", data[:8])[0]

    yield cut("at 0", lambda data: 0)
    yield cut("inside the length", lambda data: 5)
    yield cut("after the length", lambda data: 8)
    yield cut("inside the header", lambda data: size(data) // 2)
    yield cut("after the header", size)
    yield cut("inside the data", lambda data: (size(data) + len(data)) // 2)
    yield cut("before the last byte", lambda data: len(data) - 1)
    yield case("more after the data", edited(FILE, lambda data: data + b"\0"))
    for length in (0, 1, HUGE, (1 << 64) - 1, 1 << 39, 1 << 24):
        yield case(f"a header of {length} bytes", edited(FILE, lambda data, n=length: little(n) + data[8:]))
    yield case("big-endian length", edited(FILE, lambda data: data[7::-1] + data[8:]))
    for name, text in {
        "a list": b"{}[]",
        "nested": b'{"a":' + DEEP,
        "invalid UTF-8": b'{"\xff": 1}',
        "UTF-16": '{"a": 1}'.encode("utf-16-le"),
        "two million lists": b'{"a":[' + b"[]," * (1 << 21) + b"[]]}",
        "5000 digits": b'{"a":' + LONG.encode() + b"}",
        "17 MB of blanks": b"{" + b" " * (17 << 20) + b"}",
    }.items():
        yield case(f"a header that is {name}", with_header(FILE, lambda _, text=text: text))

    def twice(content: dict[str, Any]) -> bytes:
        text = json.dumps(content)
        return (text[:-1] + "," + text[1:]).encode()

    yield case("every tensor twice", with_header(FILE, twice), "twice")
    first, second = "embed_tokens.weight", "layer_norm.weight"

    def entry(field: str, value: Any) -> Any:
        def change(content: dict[str, Any]) -> None:
            if value is MISSING:
                del content[first][field]
            else:
                content[first][field] = value

        return with_header(FILE, change)

    shapes = ([-7, 8], [7, -8], [HUGE, 4], [1 << 32, 1 << 32], [1 << 63, 2], ["7", 8], [7.0, 8.0], [True, 56], 56, None)
    for shape in (*shapes, [7], [0, 8], [[7, 8]], [float("nan")], MISSING):
        yield case(f"shape {'missing' if shape is MISSING else shape}", entry("shape", shape))
    for offsets in ([-4, 220], [0, HUGE], [224, 0], [0.0, 224.0], [0], [0, 4, 8], "ab", None, [False, 224], MISSING):
        yield case(f"offsets {'missing' if offsets is MISSING else offsets}", entry("data_offsets", offsets))
    for dtype in ("F99", "f32", "", 4, None, ["F32"], "F8_E4M3", "C64", "I32", MISSING):
        shown = "missing" if dtype is MISSING else repr(dtype)
        yield case(f"dtype {shown}", entry("dtype", dtype), "embed_tokens" if dtype == "I32" else FILE)
    yield case("a tensor that is a number", with_header(FILE, lambda content: content.update({first: 3})), first)
    for name, metadata in {"numbers": {"a": 1}, "a list": ["a"], "nested": {"a": {}}}.items():
        yield case(f"metadata of {name}", with_header(FILE, lambda c, m=metadata: c.update(__metadata__=m)))

    def overlap(content: dict[str, Any]) -> None:
        content[second]["data_offsets"] = [0, 32]

    def gap(data: bytes) -> bytes:
        content, rest = header(data)
        for value in content.values():
            value["data_offsets"] = [place + 8 for place in value["data_offsets"]]
        text = json.dumps(content).encode()
        return little(len(text)) + text + bytes(8) + rest

    yield case("tensors over one another", with_header(FILE, overlap))
    yield case("a gap before the data", edited(FILE, gap))
    control = {"bad\x1b[31m\n\u2028name": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    yield case("a name to fool a terminal", with_header(FILE, lambda content: content.update(control)))
    yield case("a name of a megabyte", with_header(FILE, lambda content: content.update({"n" * (1 << 20): 1})))
    yield from in_place_of("safetensors", FILE)
    for name in ("/dev/zero", "/dev/urandom", "/proc/self/environ"):
        yield Case("safetensors", f"a link to {name}", replaced(FILE, Special("link", name)), "")


def shard_cases() -> Iterator[Case]:
    yield from raw_json("shards", INDEX)
    first = "embed_tokens.weight"
    for shard in ESCAPES:
        yield Case(
            "shards",
            f"a shard {shard[:30]!r}",
            document(INDEX, lambda d, s=shard: d["weight_map"].update({first: s})),
            INDEX,
        )
    maps: list[Any] = [MISSING, None, [], 7, {}, {first: 7}, {first: None}, {first: ["model-1.safetensors"]}]
    for value in maps:
        shown = "missing" if value is MISSING else value
        change = document(
            INDEX, lambda d, v=value: d.pop("weight_map") and None if v is MISSING else d.update(weight_map=v)
        )
        yield Case("shards", f"weight_map {shown}", change, "" if value == {} else INDEX)
    one = {"model-1.safetensors": lambda data: data[:-1]}
    yield Case(
        "shards", "a cut shard", edited("model-1.safetensors", one["model-1.safetensors"]), "model-1.safetensors"
    )
    yield Case("shards", "a missing shard", lambda files: void(files.pop("model-2.safetensors")), "model-2.safetensors")
    yield Case("shards", "a tensor of no shard", document(INDEX, lambda d: d["weight_map"].update(x=FILE)), FILE)
    yield Case(
        "shards",
        "a tensor of the other shard",
        document(INDEX, lambda d: d["weight_map"].update({first: "model-2.safetensors"})),
        first,
    )
    yield Case("shards", "a tensor left out", document(INDEX, lambda d: void(d["weight_map"].pop(first))), first)
    yield Case(
        "shards", "both shards the same", lambda f: f.update({"model-2.safetensors": f["model-1.safetensors"]}), "model"
    )
    yield from in_place_of("shards", "model-1.safetensors", INDEX)


def void(_: object) -> None:
    """For what takes something out."""


def dcp_cases() -> Iterator[Case]:
    part, name = "__0_0.distcp", "model.embed_tokens.weight"

    def changed(label: str, change: Any, says: str = "embed_tokens") -> Case:
        return Case("dcp", label, edited(".metadata", lambda data: repickled(data, change)), says)

    def place(metadata: Any) -> Any:
        return next(info for index, info in metadata.storage_data.items() if index.fqn == name)

    def box(metadata: Any) -> Any:
        return metadata.state_dict_metadata[name].chunks[0]

    def sized(*sizes: Any) -> Any:
        def change(metadata: Any) -> None:
            object.__setattr__(metadata.state_dict_metadata[name], "size", sizes)
            object.__setattr__(box(metadata), "sizes", sizes)

        return change

    for path in ESCAPES:
        yield changed(f"a part {path[:30]!r}", lambda m, p=path: setattr(place(m), "relative_path", p), "")
    for value in (-1, HUGE, 1 << 70, 1.0, True, None, "0"):
        yield changed(f"offset {value!r}", lambda m, v=value: setattr(place(m), "offset", v))
        yield changed(f"length {value!r}", lambda m, v=value: setattr(place(m), "length", v), "")
    for sizes in ((1 << 40, 8), (HUGE, HUGE), (-7, 8), (1 << 32, 1 << 32), (7.0, 8.0), (True, 8), ("7", 8), (0, 8), ()):
        yield changed(f"sizes {sizes}", sized(*sizes), "")
    yield changed("chunks that overlap", lambda m: m.state_dict_metadata[name].chunks.append(box(m)))
    yield changed("no chunks", lambda m: m.state_dict_metadata[name].chunks.clear())
    yield changed("a hundred thousand chunks", lambda m: m.state_dict_metadata[name].chunks.extend([box(m)] * 100_000))
    yield changed("no places", lambda m: m.storage_data.clear(), "no data")
    yield changed("no tensors", lambda m: m.state_dict_metadata.clear(), "no state dict")
    yield changed("another type", lambda m: setattr(m.state_dict_metadata[name], "properties", None))
    for at in (0, 1, 2, 20, 0.5, -1):
        yield Case(
            "dcp",
            f".metadata cut at {at}",
            edited(".metadata", lambda data, n=at: data[: int(n * len(data)) if isinstance(n, float) else n]),
            ".metadata",
        )
        yield Case(
            "dcp",
            f"a part cut at {at}",
            edited(part, lambda data, n=at: data[: int(n * len(data)) if isinstance(n, float) else n]),
            part,
        )
    yield Case("dcp", "a part of zeros", edited(part, lambda data: bytes(len(data))), part)
    yield Case("dcp", ".metadata of a function", replaced(".metadata", b"cos\nsystem\n(S'touch ran'\ntR."), "os.system")
    yield Case("dcp", ".metadata without an end", replaced(".metadata", b"\x80\x02" + b"]" * (5 << 20)), ".metadata")
    yield from in_place_of("dcp", part, ".metadata")


SIZES = {
    "dragn_rmsnorm/hf_ckpt_0": ("decoder_layers", "decoder_retention_heads"),
    "fla_2024_04": ("num_hidden_layers", "num_heads"),
    "fla_base/hf_safetensors": ("num_hidden_layers", "hidden_size"),
    "sd_deepnorm/hf_safetensors": ("decoder_layers", "decoder_retention_heads"),
    "syncdoth_first_tied": ("num_layers", "num_heads"),
    "syncdoth_october": ("decoder_layers", "decoder_embed_dim"),
    "xatl_affine_rms": ("decoder_layers", "decoder_retention_heads"),
    "xatl_lit/lit": ("decoder_layers", "decoder_embed_dim"),
}
COUNTS = (-1, 0, HUGE, 1 << 20, 1.5, True, "8", [8], {}, 10**30)


def config_cases() -> Iterator[Case]:
    for number, (layout, names) in enumerate(SIZES.items()):
        for name in names:
            # Every value for every layout, half of them for each of its two sizes.
            values = COUNTS[number % 2 :: 2] if name == names[0] else COUNTS[(number + 1) % 2 :: 2]
            yield from fields(f"config {layout}", "config.json", "", [((name,), values)])
    numbers = {"vocab_size": COUNTS, "layernorm_eps": (-1.0, "x", True, [], 10**400), "no_such_key": (1, "a")}
    yield from fields("config syncdoth_october", "config.json", "", [((k,), v) for k, v in numbers.items()])
    yield from raw_json("config syncdoth_october", "config.json")
    yield from raw_json("zip", "args.json")
    yield from in_place_of("config syncdoth_october", "config.json")
