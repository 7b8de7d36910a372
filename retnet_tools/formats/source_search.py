"""Where the checkpoint of an exported folder lies: found by the hashes that its record has of every source file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from retnet_tools.errors import RetNetToolsError
from retnet_tools.formats import CheckpointSource
from retnet_tools.formats.provenance import source_digests
from retnet_tools.formats.spec import Checkpoint

MOST_FOLDERS = 1000
"""Folders that are looked into at most."""


def find_source(folder: Path, record: Mapping[str, str], near: Sequence[Path]) -> CheckpointSource | None:
    """The checkpoint that an export was made of, if it still lies nearby as it was.

    Looked into are the folder beside the export that gave it its name, the others beside it, the current one and those
    in it, and `near`. Only where all files have the names of the record are they read.

    Args:
        folder: the export.
        record: sha256 of each source file by its name, as its manifest has them.
        near: further folders.
    """
    for place in _places(folder, near):
        if not record or not all((place / name).is_file() for name in record):
            continue
        for path in (place, *(place / name for name in record)):
            source = CheckpointSource(path)
            try:
                opened = source.open()
            except RetNetToolsError:
                continue
            if _is_recorded(opened, record):
                return source
    return None


def _places(folder: Path, near: Sequence[Path]) -> Iterator[Path]:
    beside, seen = folder.resolve().parent, set[Path]()
    # Default names are NAME-onnx, and NAME-onnx-int8 or NAME-int8 of that.
    parts = folder.resolve().name.split("-")
    named = [beside / "-".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
    for place in (*named, beside, Path.cwd(), *_folders(beside), *_folders(Path.cwd()), *near):
        if (real := place.resolve()) not in seen and len(seen) < MOST_FOLDERS and place.is_dir():
            seen.add(real)
            yield place


def _folders(place: Path) -> Iterator[Path]:
    try:
        yield from sorted(path for path in place.iterdir() if path.is_dir())
    except OSError:
        return


def _is_recorded(opened: Checkpoint, record: Mapping[str, str]) -> bool:
    if sorted(file.name for file in opened.source_files) != sorted(record):
        return False
    with source_digests(opened.source_files) as digests:
        return digests() == [record[file.name] for file in opened.source_files]
