"""Our own format: `config.json` beside `model.safetensors`, or beside shards and their index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retnet_tools.config import RetNetConfig
from retnet_tools.dtypes import FloatName
from retnet_tools.errors import InputError
from retnet_tools.formats.containers import Progress
from retnet_tools.formats.conversion import plan_conversion
from retnet_tools.formats.files import CheckpointFiles
from retnet_tools.formats.spec import FormatSpec, Reading, Writing, check_layer_count
from retnet_tools.formats.storage import ArrayWeights
from retnet_tools.formats.writer import CONFIG_FILE, DEFAULT_SHARD_SIZE, write_checkpoint
from retnet_tools.weights import Array, WeightSource, canonical_shapes

FORMAT_NAME = "retnet-tools"
FORMAT_VERSION = 1


def detect(files: CheckpointFiles) -> bool:
    """A `config.json` that says `"format": "retnet-tools"`."""
    return _document(files).get("format") == FORMAT_NAME


def read(files: CheckpointFiles) -> Reading:
    """The configuration as it is written there.

    Raises:
        InputError: another format, a version of it that is not known.
    """
    document, path = _document(files), files.folder / CONFIG_FILE
    if document.get("format") != FORMAT_NAME:
        raise InputError(f"no {CONFIG_FILE} of retnet-tools in {files.folder}", f'"format": "{FORMAT_NAME}"')
    version = document.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise InputError(f"{path} has format_version {version!r}", str(FORMAT_VERSION), "upgrade retnet-tools")
    config = RetNetConfig.from_dict(document.get("config", {}))
    check_layer_count(config, files.tensors)
    names = {name: name for name in canonical_shapes(config)}
    return Reading(config, f"{FORMAT_NAME} {version}", names, config_files=(path,))


def write(config: RetNetConfig) -> Writing:
    """Canonical names and the configuration as it is."""
    document = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, "config": config.to_dict()}
    return Writing(documents={CONFIG_FILE: document}, names={name: name for name in canonical_shapes(config)})


def write_canonical(
    path: Path,
    config: RetNetConfig,
    weights: Mapping[str, Array] | WeightSource,
    *,
    dtype: FloatName | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    force: bool = False,
    extra_files: Sequence[Path] = (),
    progress: Progress | None = None,
) -> list[Path]:
    """Write a checkpoint in our own format; see `plan_conversion` and `write_checkpoint` for arguments and errors.

    Memory: one block of a tensor (16 MB), or a whole one where its format transforms it.

    Returns:
        The files written.
    """
    source = ArrayWeights(weights) if isinstance(weights, Mapping) else weights
    plan = plan_conversion(
        config, source, CANONICAL, dtype=dtype, max_shard_size=max_shard_size, copies=tuple(extra_files)
    )
    return write_checkpoint(path, plan.layout, force=force, progress=progress)


def _document(files: CheckpointFiles) -> dict[str, Any]:
    return files.configs.get(files.folder / CONFIG_FILE, {})


CANONICAL = FormatSpec(
    name="canonical",
    looked_for=f'a {CONFIG_FILE} with "format": "{FORMAT_NAME}"',
    detect=detect,
    read=read,
    write=write,
)
