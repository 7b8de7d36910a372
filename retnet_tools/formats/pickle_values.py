"""Values as the operations of a pickle spell them."""

from __future__ import annotations

from typing import Any

from retnet_tools.formats.stand_ins import Global, Shell

MAX_INTEGER_BYTES = 1 << 10
SIMPLE_KEYS = (str, int, float, bool, bytes, type(None), Shell, Global)


def pairs(items: list[Any]) -> dict[Any, Any]:
    """Keys and values in turn, as a dict."""
    names = [name if type(name) is str else key(name) for name in items[::2]]
    return dict(zip(names, items[1::2], strict=True))


def key(value: Any) -> Any:
    """A key that is cheap to hash: nested tuples take exponential time, so that they become keys of their own."""
    if isinstance(value, tuple):
        flat = all(isinstance(part, str | int | float | bool | None) for part in value)
        return value if flat else Shell("key")
    return value if isinstance(value, SIMPLE_KEYS) else Shell("key")


def integer(text: str) -> Any:
    """An integer or truth value of protocol 0."""
    if text in ("00", "01"):
        return text == "01"
    if len(text) > MAX_INTEGER_BYTES:
        raise ValueError("an integer of many digits")
    return int(text.rstrip("L") or "0")


def text(data: bytes) -> str | bytes:
    """A string of Python 2, which may be bytes."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def quoted(line: bytes) -> str | bytes:
    """A string of protocol 0."""
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"\"'":
        raise ValueError("a string without quotes")
    return text(line[1:-1].decode("unicode_escape").encode("latin1"))


def unicode(data: bytes) -> str:
    """Text in UTF-8, halves of pairs allowed, as pickle does."""
    return data.decode("utf-8", "surrogatepass")
