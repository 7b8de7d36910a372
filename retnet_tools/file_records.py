"""What a file was when it was written: its size and sha256."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retnet_tools.inputs import open_input
from retnet_tools.progress import ByteProgress

HASHED_BYTES = 1 << 22
"""Of a file that are in memory at once."""


@dataclass(frozen=True)
class FileRecord:
    """What a file was when it was written."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> FileRecord:
        """The record of a file as it is. Memory: 4 MiB."""
        return cls(file.stat().st_size, hash_file(file, hashlib.sha256()))

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> FileRecord:
        """From JSON; a ValueError or KeyError for anything else."""
        size, digest = document["bytes"], document["sha256"]
        if type(size) is not int or size < 0 or not re.fullmatch("[0-9a-f]{64}", digest) or len(document) != 2:
            raise ValueError("a file without its size and sha256")
        return cls(size, digest)

    def size_problem(self, file: Path) -> str:
        """What is wrong with the size of a file, in words; nothing where it is right."""
        if not file.is_file():
            return "is missing"
        size = file.stat().st_size
        return "" if size == self.bytes else f"has {size} bytes"

    def problem(self, file: Path, told: ByteProgress) -> str:
        """What is wrong with a file that is read whole, in words; nothing where it is right.

        Args:
            told: called with the bytes just read.
        """
        found = self.size_problem(file)
        return found or ("" if hash_file(file, hashlib.sha256(), told) == self.sha256 else "has another sha256")


def hash_file(file: Path, digest: Any, told: ByteProgress = lambda count: None) -> str:
    """The hexadecimal digest of a file, read in blocks after what the digest has seen already.

    Args:
        told: called with the bytes just read.
    """
    with open_input(file) as stream:
        while block := stream.read(HASHED_BYTES):
            digest.update(block)
            told(len(block))
    return str(digest.hexdigest())
