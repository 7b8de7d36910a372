"""Texts from files and from stdin, read in one way: UTF-8, newlines as they are, with the sha256 of the bytes."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from retnet_tools.errors import InputError, UsageError
from retnet_tools.inputs import open_input

PIECE = 1 << 20
"""Bytes of a text that are read at a time."""


@dataclass(frozen=True)
class Text:
    """What a file says, under the file's name, with the sha256 of its bytes."""

    name: str
    sha256: str
    content: str


def read_text(file: Path) -> Text:
    """The whole text of a file, or of stdin for `-`.

    Raises:
        UsageError: stdin is closed.
        InputError: a file that cannot be read or is not UTF-8.
    """
    if str(file) == "-":
        if sys.stdin is None:
            raise UsageError("no stdin", "a file")
        content = sys.stdin.buffer.read()
        return Text("stdin", hashlib.sha256(content).hexdigest(), _decode(content, "stdin"))
    digest = hashlib.sha256()
    text = "".join(text_pieces(file, digest))
    return Text(file.name, digest.hexdigest(), text)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """A prompt as it is given, from a file, or from stdin (the prompt `-`, or neither, and stdin is no terminal).

    Raises:
        UsageError: both a prompt and a file, or neither and stdin is a terminal.
        InputError: a file that cannot be read, or a prompt that is not UTF-8.
    """
    if prompt is not None and file is not None:
        raise UsageError("both --prompt and --file", "one of them")
    if file is not None:
        return read_text(file).content
    if prompt is not None and prompt != "-":
        # Arguments are bytes to the system; under a locale that is not UTF-8 Python reads them otherwise.
        return _decode(os.fsencode(prompt), "a prompt")
    if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
        raise UsageError("no prompt", "-p TEXT, --file FILE, or text on stdin")
    return _decode(sys.stdin.buffer.read(), "a prompt")


def text_pieces(file: Path, digest: hashlib._Hash) -> Iterator[str]:
    """The text of a file in pieces of about `PIECE` bytes that end with a line; `digest` takes in the bytes.

    Raises:
        InputError: a file that cannot be read or is not UTF-8.
    """
    try:
        with open_input(file, pipes=True) as stream:
            while lines := stream.readlines(PIECE):
                piece = b"".join(lines)
                digest.update(piece)
                yield _decode(piece, str(file))
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror or error})", "a text file in UTF-8") from error


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 ({error.reason})", "a text in UTF-8") from error
