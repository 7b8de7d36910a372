"""Texts from files, all read in one way: UTF-8, newlines as they are, with the sha256 of the bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from retnet_tools.errors import InputError

PIECE = 1 << 20
"""Bytes of a text that are read at a time."""


@dataclass(frozen=True)
class Text:
    """A text.

    Attributes:
        name: its file's name.
        sha256: of its bytes.
        content: what they say.
    """

    name: str
    sha256: str
    content: str


def read_text(file: Path) -> Text:
    """The whole text of a file.

    Raises:
        InputError: a file that cannot be read or is not UTF-8.
    """
    digest = hashlib.sha256()
    content = "".join(text_pieces(file, digest))
    return Text(file.name, digest.hexdigest(), content)


def read_stream(stream: IO[bytes], name: str) -> Text:
    """The whole text of an open stream.

    Raises:
        InputError: it is not UTF-8.
    """
    content = stream.read()
    return Text(name, hashlib.sha256(content).hexdigest(), _decode(content, name))


def text_pieces(file: Path, digest: hashlib._Hash) -> Iterator[str]:
    """The text of a file in pieces of about `PIECE` bytes that end with a line.

    Args:
        digest: takes in the bytes as they are read.

    Raises:
        InputError: a file that cannot be read or is not UTF-8.
    """
    try:
        with file.open("rb") as stream:
            while lines := stream.readlines(PIECE):
                piece = b"".join(lines)
                digest.update(piece)
                yield _decode(piece, str(file))
    except FileNotFoundError as error:
        raise InputError(f"no file {file}", "a text file in UTF-8") from error
    except IsADirectoryError as error:
        raise InputError(f"{file} is a folder", "a text file in UTF-8") from error
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror or error})", "a text file in UTF-8") from error


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 ({error.reason})", "a text in UTF-8") from error
