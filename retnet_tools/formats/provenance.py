"""Where a model came from: hashes of its source files and versions of what read them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from retnet_tools import __version__
from retnet_tools.formats.hub import HubOrigin, hub_origin

_HASH_BLOCK = 1 << 22


class SourceHasher:
    """sha256 of files, computed on a thread of its own; leaving the context stops it.

    hashlib releases the interpreter lock, so hashing runs beside reading and writing. Memory: 4 MiB.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        self._digests = [self._pool.submit(self._sha256, file) for file in self.files]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def digests(self) -> list[str]:
        """The sha256 of each file, in order; waits for them."""
        return [digest.result() for digest in self._digests]

    def _sha256(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while not self._stop.is_set() and (block := file.read(_HASH_BLOCK)):
                digest.update(block)
        return digest.hexdigest()


def provenance(
    source_format: str, files: Sequence[Path], digests: Sequence[str], notes: Sequence[str]
) -> dict[str, Any]:
    """The provenance record: where the weights came from and what read them."""
    origin = _origin(files)
    return {
        "source_format": source_format,
        **({} if origin is None else {"hub": {"repository": origin.repository, "commit": origin.commit}}),
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
