"""Where a model came from: hashes of its source files and versions of what read them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from retnet_tools import __version__

_HASH_BLOCK = 1 << 22


def sha256_of(path: Path) -> str:
    """sha256 of a file, read in blocks of 4 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def provenance(source_format: str, hashes: Iterable[tuple[str, str]], notes: Sequence[str]) -> dict[str, Any]:
    """The provenance record: where the weights came from and what read them."""
    return {
        "source_format": source_format,
        "source_files": [{"name": name, "sha256": digest} for name, digest in hashes],
        "notes": list(notes),
        "retnet_tools": __version__,
        "libraries": {name: metadata.version(name) for name in ("onnx", "onnx-ir", "numpy")},
    }


def provenance_section(record: dict[str, Any]) -> str:
    """The record as a section of a model card."""
    lines = [
        "## Provenance",
        "",
        f"Converted by retnet-tools {record['retnet_tools']} from {record['source_format']}:",
        "",
        *(f"- `{file['name']}`, sha256 `{file['sha256']}`" for file in record["source_files"]),
    ]
    if record["notes"]:
        lines += ["", *(f"Note: {note}." for note in record["notes"])]
    return "\n".join(lines) + "\n"
