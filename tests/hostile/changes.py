"""Ways to change a file of a folder."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tests.hostile.judge import Case
from tests.hostile.material import Files, Special

HUGE = 1 << 62
LONG = "9" * 5000
DEEP = b"[" * 200_000


def edited(name: str, change: Callable[[bytes], Any]) -> Callable[[Files], None]:
    """Another content, made of the one that is there."""

    def apply(files: Files) -> None:
        files[name] = change(files[name])

    return apply


def cut(name: str, at: float) -> Callable[[Files], None]:
    """A file's first bytes, or the first part of them."""
    return edited(name, lambda data: data[: int(at * len(data)) if isinstance(at, float) else at])


def replaced(name: str, content: Any) -> Callable[[Files], None]:
    """Another content."""
    return lambda files: files.update({name: content})


def document(name: str, change: Callable[[Any], Any]) -> Callable[[Files], None]:
    """A JSON document, changed in place, or replaced by what `change` gives."""

    def apply(data: bytes) -> bytes:
        content = json.loads(data)
        given = change(content)
        return json.dumps(content if given is None else given).encode()

    return edited(name, apply)


def put_at(*path: Any) -> Callable[[Any, Any], None]:
    """Sets what lies at a path of keys and indices."""

    def apply(content: Any, value: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        if value is MISSING:
            del content[path[-1]]
        else:
            content[path[-1]] = value

    return apply


MISSING = object()


def fields(kind: str, file: str, says: str, rows: Iterable[tuple[tuple[Any, ...], Iterable[Any]]]) -> Iterator[Case]:
    """A case for each value of each field of a JSON document; `{}` in `says` is the field's name."""
    for path, values in rows:
        for value in values:
            shown = "missing" if value is MISSING else repr(value)[:40]
            words = next((str(key) for key in reversed(path) if isinstance(key, str)), "")
            change = document(file, lambda content, path=path, value=value: put_at(*path)(content, value))
            yield Case(kind, f"{'.'.join(map(str, path))} = {shown}", change, says.format(words))


def raw_json(kind: str, file: str, says: str | None = None) -> Iterator[Case]:
    """What any JSON document may be in place of itself."""
    says = file if says is None else says
    for name, content in {
        "empty": b"",
        "not JSON": b"{",
        "a list": b"[1]",
        "a number": b"7",
        "text": b'"a"',
        "null": b"null",
        "nested lists": DEEP,
        "nested objects": b'{"a":' * 100_000,
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "invalid UTF-8": b'{"a": "\xff\xfe"}',
        "overlong UTF-8": b'{"a": "\xc0\xaf"}',
        "17 MB of lists": b"[" + b"[]," * (17 << 18) + b"[]]",
        "a million lists": b"[" + b"[]," * (1 << 20) + b"[]]",
    }.items():
        yield Case(kind, f"{file}: {name}", replaced(file, content), says)

    def twice(data: bytes) -> bytes:
        pairs = list(json.loads(data).items())
        return ("{" + ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in (*pairs, pairs[-1])) + "}").encode()

    for name, change in {
        "a name twice": twice,
        "cut in the middle": lambda data: data[: len(data) // 2],
        "without its last byte": lambda data: data.rstrip()[:-1],
        "more after its end": lambda data: data + b"{}",
        "NaN": lambda data: data.rstrip()[:-1] + b',"nan_field":NaN}',
        "Infinity": lambda data: data.rstrip()[:-1] + b',"nan_field":-Infinity}',
        "1e999": lambda data: data.rstrip()[:-1] + b',"nan_field":1e999}',
        "5000 digits": lambda data: data.rstrip()[:-1] + b',"nan_field":' + LONG.encode() + b"}",
    }.items():
        yield Case(kind, f"{file}: {name}", edited(file, change), says)


def in_place_of(kind: str, *names: str) -> Iterator[Case]:
    """No regular file where one should be."""
    for name in names:
        for what, content in {
            "a pipe": Special("pipe"),
            "a folder": Special("folder"),
            "a device": Special("link", "/dev/zero"),
            "a link to itself": Special("link", name.rpartition("/")[2]),
            "a link to nothing": Special("link", "nothing"),
        }.items():
            yield Case(kind, f"{name} is {what}", replaced(name, content), "")


def little(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little")


def header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Files], None]:
    """A safetensors file with another header; `change` may give its text."""

    def apply(data: bytes) -> bytes:
        content, rest = header(data)
        given = change(content)
        text = given if isinstance(given, bytes) else json.dumps(content).encode()
        return little(len(text)) + text + rest

    return edited(name, apply)
