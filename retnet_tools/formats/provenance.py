"""Where a model came from: hashes of its source files and versions of what read them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from retnet_tools.formats.hub import HubOrigin, hub_origin
from retnet_tools.inputs import open_input
from retnet_tools.version import __version__

_HASH_BLOCK = 1 << 22


@contextmanager
def source_digests(files: Sequence[Path]) -> Iterator[Callable[[], list[str]]]:
    """sha256 of files, computed on a thread of its own; gives what waits for them. Leaving the context stops it.

    hashlib releases the interpreter lock, so hashing runs beside reading and writing. Memory: 4 MiB.
    """
    stop = threading.Event()

    def sha256(path: Path) -> str:
        digest = hashlib.sha256()
        with open_input(path) as file:
            while not stop.is_set() and (block := file.read(_HASH_BLOCK)):
                digest.update(block)
        return digest.hexdigest()

    with ThreadPoolExecutor(1) as pool:
        digests = [pool.submit(sha256, file) for file in files]
        try:
            yield lambda: [digest.result() for digest in digests]
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def provenance(
    source_format: str, files: Sequence[Path], digests: Sequence[str], notes: Sequence[str]
) -> dict[str, Any]:
    """The provenance record: where the weights came from and what read them."""
    origin = _origin(files)
    return {
        "source_format": source_format,
        **({} if origin is None else {"hub": asdict(origin)}),
        "source_files": [{"name": file.name, "sha256": digest} for file, digest in zip(files, digests, strict=True)],
        "notes": list(notes),
        "retnet_tools": __version__,
        "libraries": {name: metadata.version(name) for name in ("onnx", "onnx-ir", "numpy")},
    }


def provenance_section(source_format: str, files: Sequence[Path], notes: Sequence[str]) -> str:
    """Where a converted checkpoint comes from, as a section of a model card: files with their sizes, no hashes.

    Hashing takes longer than converting; the card says what was read, and an export's retnet.json has the hashes.
    """
    origin = _origin(files)
    place = "" if origin is None else f" ({origin.repository} on the hub, commit {origin.commit})"
    lines = [
        "## Provenance",
        "",
        f"Converted by retnet-tools {__version__} from {source_format}{place}:",
        "",
        *(f"- `{file.name}`, {file.stat().st_size} bytes" for file in files),
    ]
    if notes:
        lines += ["", *(f"Note: {note}." for note in notes)]
    return "\n".join(lines) + "\n"


def _origin(files: Sequence[Path]) -> HubOrigin | None:
    return next((origin for file in files if (origin := hub_origin(file)) is not None), None)
