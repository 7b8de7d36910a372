"""Hostile tokenizers, texts, token ids, prompts, answers, and results of unfinished work."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.hostile.changes import DEEP, HUGE, LONG, document, edited, fields, in_place_of, raw_json, replaced
from tests.hostile.judge import Case

TOKENIZER, WORK = "tokenizer.json", f"gptq-{'0' * 32}/m.npz"


def tokenizer_cases() -> Iterator[Case]:
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        yield from raw_json("tokenizer", name)
    for name, content in {
        "empty": b"",
        "an empty object": b"{}",
        "a list": b"[]",
        "null": b"null",
        "nested": DEEP,
        "nested objects": b'{"model":' * 100_000,
        "invalid UTF-8": b'{"\xff": 1}',
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "a model of nothing": b'{"model": {}}',
        "a Git-LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
    }.items():
        yield Case("tokenizer", f"tokenizer.json is {name}", replaced(TOKENIZER, content), TOKENIZER)
    unknown = {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None, "byte_fallback": False}
    change = document(TOKENIZER, lambda content: content.update(model=unknown))
    yield Case("tokenizer", "no token for the unknown", change, "tokenizer")
    for at in (1, 0.5, -1):
        change = edited(TOKENIZER, lambda data, n=at: data[: int(n * len(data)) if isinstance(n, float) else n])
        yield Case("tokenizer", f"tokenizer.json cut at {at}", change, TOKENIZER)
    rows: list[tuple[tuple[Any, ...], Any]] = [
        (("version",), ("2.0", 7)),
        (("model",), (None, 7, [], {"type": "NoSuch"}, {"type": "Unigram", "vocab": [["a", "b"]], "unk_id": 0})),
        (("model", "vocab"), (None, 7, ["a"], {"a": -1}, {"a": HUGE}, {"a": "b"}, {"a": 1.5})),
        (("model", "merges"), (None, 7, ["a"], [["a", "b", "c"]], [["no", "such"]], ["x y"])),
        (("added_tokens",), (7, [7], [{}], [{"id": -1, "content": "a"}], [{"id": HUGE, "content": "a"}])),
        (
            ("pre_tokenizer",),
            (7, {"type": "NoSuch"}, {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed"}),
        ),
        (("normalizer",), (7, {"type": "NoSuch"}, {"type": "Replace", "pattern": {"Regex": "["}, "content": ""})),
        (("decoder",), (7, {"type": "NoSuch"})),
        (("truncation",), (7, {"max_length": -1})),
    ]
    yield from fields("tokenizer", TOKENIZER, TOKENIZER, rows)
    ids: list[tuple[tuple[Any, ...], Any]] = [
        (("eos_token_id",), ("5", 5.0, True, {}, [5, "5"], [[5]])),
        (("bos_token_id",), ("5", [None])),
    ]
    yield from fields("tokenizer", "generation_config.json", "{}", ids)
    decoders: list[Any] = [7, ["a"], {LONG: "a"}, {"²": "a"}, {"-1": "a"}, {"x": "a"}]
    yield from fields(
        "tokenizer", "tokenizer_config.json", "added_tokens_decoder", [(("added_tokens_decoder",), decoders)]
    )
    yield from in_place_of("tokenizer", TOKENIZER, "tokenizer_config.json")


def vocabulary_cases() -> Iterator[Case]:
    yield from raw_json("byte-level", "vocab.json")
    first = b'{"a": %s}'
    for number in ("-1", "1.5", "true", '"1"', "null", str(HUGE), "4294967296", LONG, "[1]"):
        yield Case("byte-level", f"an id {number[:20]}", replaced("vocab.json", first % number.encode()), "vocab.json")
    for name, content in {
        "of other tokens": b"#version: 0.2\nno such\n",
        "of single words": b"#version: 0.2\nto\n",
        "in UTF-16": "t o\n".encode("utf-16"),
        "of invalid UTF-8": b"\xff \xfe\n",
        "of 17 MB": b"t o\n" * (17 << 18),
    }.items():
        yield Case("byte-level", f"merges {name}", replaced("merges.txt", content), "merges.txt")
    yield from in_place_of("byte-level", "merges.txt")
    for name, content in {
        "empty": b"",
        "text": b"hello",
        "a length of 4 GB": b"\x0a\xff\xff\xff\xff\x0f",
        "endless groups": b"\x0b" * 100_000,
        "a million empty pieces": b"\x0a\x00" * (1 << 20),
        "a piece of a megabyte": b"\x0a\x84\x80\x40\x0a\x80\x80\x40" + b"a" * (1 << 20),
        "17 MB": bytes(17 << 20),
        "invalid UTF-8": b"\x0a\x04\x0a\x02\xff\xfe",
        "pieces of NaN": b"\x0a\x08\x0a\x01a\x15\x00\x00\xc0\x7f" * 3,
    }.items():
        yield Case("pieces", f"a model that is {name}", replaced("tokenizer.model", content), "tokenizer.model")
    for at in (1, 100, 0.5, -1):
        change = edited("tokenizer.model", lambda data, n=at: data[: int(n * len(data)) if isinstance(n, float) else n])
        yield Case("pieces", f"a model cut at {at}", change, "tokenizer.model")
    yield from in_place_of("pieces", "tokenizer.model")
    for value in (-1, HUGE, 1.5, "1", None, True, 0):
        change = document("added_tokens.json", lambda d, v=value: d.update({"<x>": v}))
        yield Case("pieces", f"an added token {value!r}", change, "id" if value == 0 and value is not False else "<x>")
    for settings in ({"tokenizer_class": "Evil"}, {"tokenizer_class": 7}, {"add_bos_token": True, "bos_token": "none"}):
        change = replaced("tokenizer_config.json", json.dumps(settings).encode())
        yield Case("pieces", f"settings {settings}", change, "")
    for name, content in {
        "a word without a count": b"5\n",
        "a count that is none": b"5 many\n",
        "a word twice": b"5 9\n6 9\n5 9\n",
        "its own word": b"<s> 9\n",
        "an empty word": b" 9\n",
        "invalid UTF-8": b"\xff 9\n",
        "UTF-16": "5 9\n".encode("utf-16"),
        "other words": b"to 9\nbe 9\n",
        "17 MB": b"5 9\n" * (5 << 20),
    }.items():
        yield Case("fairseq", f"a dictionary of {name}", replaced("dict.txt", content), "dict.txt")
    yield from in_place_of("fairseq", "dict.txt", "vocab.bpe", "encoder.json")


def text_cases() -> Iterator[Case]:
    for name, content in {
        "UTF-16": "To be".encode("utf-16"),
        "invalid UTF-8": b"To \xff be",
        "a cut character": "To bé".encode()[:-1],
        "a surrogate": b"To \xed\xa0\x80 be",
        "an overlong character": b"\xc0\xaf",
    }.items():
        yield Case("text", name, replaced("text.txt", content), "text.txt")
        yield Case("ids", name, replaced("ids.txt", content), "ids.txt")
    yield from in_place_of("text", "text.txt")
    yield from in_place_of("ids", "ids.txt")
    for words in ("-1", "61", str(HUGE), LONG, "1.0", "0x10", "one", "", "²", "1e3", "NaN", "1;2", "true"):
        yield Case("ids", f"ids {words[:20]!r}", replaced("ids.txt", words.encode()), "")


def row_cases() -> Iterator[Case]:
    for name, line in {
        "no JSON": "{",
        "a list": "[1]",
        "a number": "7",
        "null": "null",
        "no prompt": "{}",
        "both": '{"tokens": [1], "prompt": "1"}',
        "tokens twice": '{"tokens": [1], "tokens": [2]}',
        "tokens of text": '{"tokens": ["1"]}',
        "tokens of floats": '{"tokens": [1.0]}',
        "tokens that are true": '{"tokens": [true]}',
        "tokens in lists": '{"tokens": [[1]]}',
        "tokens that are a number": '{"tokens": 1}',
        "no tokens": '{"tokens": []}',
        "a negative token": '{"tokens": [-1]}',
        "a token past the vocabulary": '{"tokens": [61]}',
        "a token of 2^62": f'{{"tokens": [{HUGE}]}}',
        "a token of 5000 digits": f'{{"tokens": [{LONG}]}}',
        "NaN": '{"tokens": [NaN]}',
        "1e999": '{"tokens": [1e999]}',
        "an id that is NaN": '{"tokens": [1], "id": NaN}',
        "an empty prompt": '{"prompt": ""}',
        "a prompt that is a number": '{"prompt": 7}',
        "half a surrogate": '{"prompt": "\\ud800"}',
        "nested": "[" * 200_000,
        "nested objects": '{"tokens":' * 100_000,
        "two million lists": "[" + "[]," * (1 << 21) + "[]]",
    }.items():
        yield Case(
            "rows", name, edited("prompts.jsonl", lambda data, line=line: data + line.encode() + b"\n"), "prompts"
        )
    for name, content in {
        "invalid UTF-8": b'{"prompt": "\xff"}\n',
        "UTF-16": '{"tokens": [1]}\n'.encode("utf-16"),
        "a line of 17 MB": b'{"prompt": "' + b"1 " * (17 << 19) + b'"}\n',
        "a line of 64 MB without an end": b"[" * (64 << 20),
    }.items():
        yield Case("rows", name, replaced("prompts.jsonl", content), "prompts.jsonl")
    yield from in_place_of("rows", "prompts.jsonl")


def answer_cases() -> Iterator[Case]:
    def case(name: str, change: Callable[[bytes], Any]) -> Case:
        return Case("answers", name, edited("out.jsonl", change), "out.jsonl")

    def row(**values: Any) -> Callable[[bytes], bytes]:
        def change(data: bytes) -> bytes:
            lines = data.splitlines(keepends=True)
            return json.dumps(json.loads(lines[0]) | values).encode() + b"\n" + lines[1]

        return change

    for index in (-1, 2, HUGE, 1.0, True, "0", None, [0]):
        yield case(f"an index {index!r}", row(index=index))
    for key in (None, 7, "", "0" * 16, [], {"a": 1}):
        yield case(f"a key {key!r}", row(key=key))
    for name, line in {
        "no JSON": b"{\n",
        "a list": b"[]\n",
        "null": b"null\n",
        "an empty line": b"\n",
        "nested": DEEP + b"\n",
        "two million lists": b"[" + b"[]," * (1 << 21) + b"[]]\n",
        "invalid UTF-8": b'{"index": 0, "key": "\xff"}\n',
        "UTF-16": '{"index": 0}\n'.encode("utf-16"),
        "NaN": b'{"index": NaN, "key": ""}\n',
        "5000 digits": b'{"index": ' + LONG.encode() + b', "key": ""}\n',
        "an index twice": b'{"index": 0, "index": 0, "key": ""}\n',
        "a cut text": b"To be",
        "zeros": bytes(100),
    }.items():
        yield case(f"answers of {name}", lambda data, line=line: line)


def unfinished_cases() -> Iterator[Case]:
    def case(name: str, change: Callable[[bytes], Any]) -> Case:
        return Case("unfinished", name, edited(WORK, change), "m.npz")

    def arrays(**values: Any) -> Callable[[bytes], bytes]:
        def change(data: bytes) -> bytes:
            buffer = io.BytesIO()
            with np.load(io.BytesIO(data)) as parts:
                found = {name: value for name, value in {**parts, **values}.items() if value is not None}
            np.savez(buffer, **found)
            return buffer.getvalue()

        return change

    def bomb(data: bytes) -> bytes:
        buffer = io.BytesIO()
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40,)})
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("codes.npy", head.getvalue() + bytes(64 << 20))
        return buffer.getvalue()

    for at in (0, 1, 0.5, -1):
        yield case(f"cut at {at}", lambda data, n=at: data[: int(n * len(data)) if isinstance(n, float) else n])
    yield case("no codes", arrays(codes=None))
    yield case("no scales", arrays(scales=None))
    yield case("codes that are objects", arrays(codes=np.array([print], dtype=object)))
    yield case("scales of text", arrays(scales=np.array(["a"])))
    yield case("a bomb of a terabyte", bomb)
    yield case("text", lambda data: b"hello")
    yield case(
        "an array alone", lambda data: b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}"
    )
    yield case("a pickle", lambda data: b"cos\nsystem\n(S'touch ran'\ntR.")
    yield from in_place_of("unfinished", WORK)


def budget_cases() -> Iterator[Case]:
    version = b"schema_version = 1\n"
    for name, content in {
        "empty": b"",
        "no TOML": b"{",
        "another version": b"schema_version = 2\n",
        "a version that is true": b"schema_version = true\n",
        "a version of text": b'schema_version = "1"\n',
        "a field twice": version + version,
        "a table twice": version + b"[noise]\n[noise]\n",
        "an unknown field": version + b"x = 1\n",
        "an unknown field inside": version + b"[noise]\nx = 1\n",
        "a number for a table": version + b"noise = 1\n",
        "a table for a number": version + b"[noise.headroom]\n",
        "NaN": version + b"[noise]\nheadroom = nan\n",
        "infinity": version + b"[state]\nfloat32 = inf\n",
        "1e999": version + b"[state]\nfloat32 = 1e999\n",
        "a negative number": version + b"[state]\nfloat32 = -1.0\n",
        "text for a number": version + b'[state]\nfloat32 = "1"\n',
        "truth for a number": version + b"[state]\nfloat32 = true\n",
        "a float for an integer": version + b"[noise]\ncopies = 4.0\n",
        "no copies": version + b"[noise]\ncopies = 0\n",
        "2^62 copies": version + f"[noise]\ncopies = {HUGE}\n".encode(),
        "5000 digits": version + b"[noise]\ncopies = " + LONG.encode() + b"\n",
        "nested lists": version + b"x = " + DEEP,
        "nested tables": version + b"[" + b"a." * 100_000 + b"a]\n",
        "nested keys": version + b"a." * 100_000 + b"a = 1\n",
        "invalid UTF-8": version + b"# \xff\n",
        "UTF-16": "schema_version = 1".encode("utf-16"),
        "17 MB": version + b"#" * (17 << 20),
        "a control character": version + b"# \x00\n",
    }.items():
        yield Case("budget", name, replaced("b.toml", content), "b.toml")
    yield from in_place_of("budget", "b.toml")
