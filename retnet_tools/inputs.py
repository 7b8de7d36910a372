"""Files from strangers, opened and read in one way: regular files only, within a limit, and JSON that says one thing.

A pipe would wait for ever and a device never end; a link is followed, as the caches of hubs are made of links. A name
that a document gives is a name in the document's folder. JSON is UTF-8 with or without a byte order mark, each name of
an object once, numbers finite, and few enough values that they stay within some hundred megabytes.
"""

from __future__ import annotations

import json
import math
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from retnet_tools.errors import InputError

MAX_DOCUMENT = 1 << 24
"""Bytes of a JSON document, or of one line of JSON lines."""
MAX_CONTAINERS = 1 << 20
"""Objects and lists in a document, whose 2 bytes would become 64 each."""
MAX_NAME = 255
# A pipe in a file's place would wait for its other end.
_NO_WAITING = getattr(os, "O_NONBLOCK", 0)
_FLAGS = os.O_RDONLY | _NO_WAITING | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_OPEN_PIPES = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
_FORBIDDEN = frozenset("/\\:\0")


def open_input(path: Path, *, pipes: bool = False) -> BufferedReader:
    """A file to read bytes from.

    Args:
        pipes: whether a pipe that the shell has opened, such as `<(command)`, will do.

    Raises:
        InputError: it is missing, may not be read, or is a folder, a pipe, a socket or a device.
    """
    pipe = pipes and str(path).startswith(_OPEN_PIPES)
    try:
        # Asked before opening too: of some devices that alone does something.
        mode = os.stat(path).st_mode
        if pipe or stat.S_ISREG(mode):
            descriptor = os.open(path, _FLAGS & ~_NO_WAITING if pipe else _FLAGS)
            mode = os.fstat(descriptor).st_mode
            if pipe or stat.S_ISREG(mode):
                return os.fdopen(descriptor, "rb")
            os.close(descriptor)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        found = f"no file {path}" if isinstance(error, FileNotFoundError) else f"cannot read {path} ({reason})"
        raise InputError(found, "a file that can be read", "check the path") from error
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    kind = next((words for is_kind, words in kinds if is_kind(mode)), "a device")
    raise InputError(f"{path} is {kind}", "a file", "name a file")


def read_input(path: Path, limit: int = MAX_DOCUMENT) -> bytes:
    """The whole of a file that should be small.

    Raises:
        InputError: as `open_input`, or a file of more than `limit` bytes.
    """
    with open_input(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise InputError(
            f"{path} has {max(path.stat().st_size, len(data))} bytes", f"at most {limit}", "check the file"
        )
    return data


def read_words(path: Path, limit: int = MAX_DOCUMENT) -> str:
    """The whole text of a file that should be small, UTF-8, with or without a byte order mark.

    Raises:
        InputError: as `read_input`, or not UTF-8.
    """
    try:
        return read_input(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})", "text in UTF-8") from error


def load_json(path: Path, expected: str = "a JSON document", action: str = "fetch or write it again") -> Any:
    """The JSON document in a file.

    Raises:
        InputError: as `read_input`, or no JSON as `parse_json` reads it.
    """
    data = read_input(path)
    try:
        return parse_json(data)
    except ValueError as error:
        raise InputError(f"{path} cannot be read as JSON ({error})", expected, action) from error


def parse_json(data: bytes | str, limit: int = MAX_DOCUMENT) -> Any:
    """A JSON document, each name of an object once and every number finite; anything else is a `ValueError`."""
    text = data if isinstance(data, str) else data.decode("utf-8-sig")
    if len(text) > limit:
        raise ValueError(f"{len(text)} characters, of at most {limit}")
    if text.count("[") + text.count("{") > MAX_CONTAINERS:
        raise ValueError(f"more than {MAX_CONTAINERS} objects and lists")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def part_path(folder: Path, name: object) -> Path | None:
    """The path of a file that a document in a folder names; None for what is no plain name of a file in it."""
    plain = isinstance(name, str) and 0 < len(name) <= MAX_NAME and name not in (".", "..")
    return folder / str(name) if plain and not _FORBIDDEN & set(str(name)) else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name {name[:60]!r} occurs twice")
        result[name] = value
    return result


def _no_number(text: str) -> float:
    raise ValueError(f"{text}, which is no number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]}, which no float can hold")
    return value
