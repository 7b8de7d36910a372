"""Whether files are what was written: sizes and sha256 of exports, and what checkpoints say of themselves."""

from __future__ import annotations

import hashlib
import re
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from retnet_tools.errors import InputError
from retnet_tools.file_records import HASHED_BYTES, FileRecord, hash_file
from retnet_tools.formats.content import INDEX_SUFFIX
from retnet_tools.inputs import load_json, open_input
from retnet_tools.progress import ByteProgress

SAFETENSORS_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class FileCheck:
    """What was held against a file.

    Attributes:
        how: sha256 (an export's record, or the hub's name of it), record (whether there is one), git-sha1 (the hub's
            name of it), crc32 (of each entry of a torch file), size (by a header or an index), none (a file that says
            nothing of itself).
        problem: what is wrong; empty where nothing is.
    """

    file: Path
    how: str
    problem: str = ""


def require_intact(checks: Sequence[FileCheck]) -> None:
    """Do nothing for files of which none has a problem.

    Raises:
        InputError: the first that has one, and how many have.
    """
    bad = [check for check in checks if check.problem]
    if bad:
        more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        action = "remove it, or export again" if bad[0].how == "record" else "fetch it or make it again"
        raise InputError(f"{bad[0].file} {bad[0].problem}{more}", f"what was written ({bad[0].how})", action)


def check_records(
    folder: Path, files: Mapping[str, FileRecord], read: Collection[str], told: ByteProgress
) -> Iterator[FileCheck]:
    """Hold the files of an export to the record in its manifest, and what others read there to having a record.

    Args:
        read: names of files that somebody reads where they are there.
    """
    for name, record in files.items():
        yield FileCheck(folder / name, "sha256", record.problem(folder / name, told))
    for name in sorted(set(read) - files.keys()):
        if (folder / name).exists():
            yield FileCheck(folder / name, "record", "is in no record")


def check_checkpoint(files: Sequence[Path], told: ByteProgress) -> Iterator[FileCheck]:
    """Hold the files of an opened checkpoint to what they, their index and the hub's cache say of them.

    Opening has held headers and indices to the sizes of their files already. Nothing in them is run.
    """
    for file in files:
        blob = file.resolve()
        if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", blob.name):
            yield _check_blob(file, blob, told)
        elif file.suffix != SAFETENSORS_SUFFIX and zipfile.is_zipfile(file):
            yield FileCheck(file, "crc32", _entry_problem(file, told))
        elif file.name.endswith(INDEX_SUFFIX):
            yield FileCheck(file, "size", _index_problem(file))
        else:
            told(file.stat().st_size)
            yield FileCheck(file, "size" if file.suffix == SAFETENSORS_SUFFIX else "none")


def _check_blob(file: Path, blob: Path, told: ByteProgress) -> FileCheck:
    """The hub's cache names large files by their sha256, and small ones as git does."""
    how, digest = ("sha256", hashlib.sha256()) if len(blob.name) == 64 else ("git-sha1", hashlib.sha1())
    if how == "git-sha1":
        digest.update(f"blob {blob.stat().st_size}\0".encode())
    return FileCheck(file, how, "" if hash_file(blob, digest, told) == blob.name else f"has another {how}")


def _entry_problem(file: Path, told: ByteProgress) -> str:
    name = ""
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                name = info.filename[:80]
                with archive.open(info) as entry:
                    while block := entry.read(HASHED_BYTES):
                        told(len(block))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        return f"has a damaged entry {name!r} ({error})"
    return ""


def _index_problem(index: Path) -> str:
    """Whether an index gives the size of its shards' tensors; that it names them all was seen when it was opened."""
    document = load_json(index)
    metadata = document.get("metadata") if isinstance(document, dict) else None
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    shards = {index.parent / name for name in document["weight_map"].values()}
    if type(total) is not int or any(shard.suffix != SAFETENSORS_SUFFIX for shard in shards):
        return ""
    found = sum(shard.stat().st_size - 8 - _header_bytes(shard) for shard in shards)
    return "" if found == total else f"says {total} bytes in all, where its shards hold {found}"


def _header_bytes(shard: Path) -> int:
    with open_input(shard) as file:
        return int.from_bytes(file.read(8), "little")
