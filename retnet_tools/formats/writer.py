"""Writes a checkpoint folder, one tensor at a time.

The configuration appears last: a folder without it is no checkpoint, so an interrupted write never looks finished.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retnet_tools.errors import OutputError, UsageError
from retnet_tools.formats.safetensors_files import write_safetensors
from retnet_tools.formats.spec import CONFIG_FILE, SAFETENSORS_FILE
from retnet_tools.formats.storage import PlannedTensor
from retnet_tools.formats.torch_files import write_torch
from retnet_tools.progress import ByteProgress
from retnet_tools.staging import staged_folder

INDEX_FILE = "model.safetensors.index.json"
SHARD_PATTERN = "model-*-of-*.safetensors"
DEFAULT_SHARD_SIZE = 5_000_000_000
_OTHER_BYTES = 1 << 20


@dataclass(frozen=True)
class CheckpointLayout:
    """What a checkpoint folder will hold, known before any tensor is read.

    Attributes:
        weights: file name to its tensors; `.safetensors` or `.pt` by suffix.
        documents: file name to JSON, the configuration last.
        texts: file name to what makes its text, such as a model card; called after the weights are written.
        copies: files to copy under their own names.
    """

    weights: Mapping[str, Sequence[PlannedTensor]]
    documents: Mapping[str, Mapping[str, Any]]
    texts: Mapping[str, Callable[[], str]] = field(default_factory=dict)
    copies: Sequence[Path] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data; what shares storage counts once."""
        return sum(t.nbytes for tensors in self.weights.values() for t in tensors if t.same_as is None)

    @property
    def names(self) -> list[str]:
        """All files, in the order in which they appear."""
        return [*self.weights, *(file.name for file in self.copies), *self.texts, *self.documents]


def shard(tensors: Sequence[PlannedTensor], limit: int) -> tuple[dict[str, list[PlannedTensor]], dict[str, Any] | None]:
    """Tensors in safetensors files of at most `limit` bytes of data, and the index if there are several files.

    Raises:
        UsageError: a limit below 1.
    """
    if limit < 1:
        raise UsageError(f"max_shard_size is {limit}", "a positive number of bytes")
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SAFETENSORS_FILE: shards[0]}, None
    files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": part for i, part in enumerate(shards, 1)}
    weight_map = {tensor.name: file for file, part in files.items() for tensor in part}
    total = sum(tensor.nbytes for tensor in tensors)
    return files, {"metadata": {"total_size": total}, "weight_map": weight_map}


def write_checkpoint(path: Path, layout: CheckpointLayout, *, force: bool, progress: ByteProgress | None) -> list[Path]:
    """Write a checkpoint folder; other files that are in it stay.

    Memory: one block of a tensor (16 MB), or a whole one where its format transforms it.

    Args:
        progress: called with the bytes of each tensor once it is written.

    Returns:
        The files written.

    Raises:
        UsageError: a checkpoint is there and `force` is not set.
        OutputError: the path is no folder, or the disk is full; nothing new is left behind.
        InputError: a tensor that cannot be read or does not fit its type.
    """
    if len(set(layout.names)) < len(layout.names):
        raise OutputError("an extra file has the name of a file of the checkpoint", "another name", "rename it")
    check_folder(path, layout, force=force)
    *_, config = layout.documents
    stale = [file.name for file in _present(path) if file.name not in layout.names]
    with staged_folder(path, marker=config, required_bytes=layout.nbytes + _OTHER_BYTES, stale=stale) as folder:
        for name, tensors in layout.weights.items():
            write = write_safetensors if name.endswith(".safetensors") else write_torch
            write(folder / name, tensors, progress)
        for file in layout.copies:
            shutil.copyfile(file, folder / file.name)
        for name, make_text in layout.texts.items():
            (folder / name).write_text(make_text(), encoding="utf-8")
        for name, document in layout.documents.items():
            (folder / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return [path / name for name in layout.names]


def check_folder(path: Path, layout: CheckpointLayout, *, force: bool) -> None:
    """Refuse a path that is a file, or where a checkpoint is and `force` is not set."""
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file", "a folder", "name another output")
    if force or not path.is_dir():
        return
    for found in _present(path, layout.names):
        raise UsageError(f"{found} exists already", action="name another output, or add --force to replace it")


def _present(path: Path, names: Sequence[str] = ()) -> list[Path]:
    named = [path / name for name in dict.fromkeys((CONFIG_FILE, SAFETENSORS_FILE, INDEX_FILE, *names))]
    return [file for file in (*named, *sorted(path.glob(SHARD_PATTERN))) if file.exists()]
