"""Our own format: `config.json` beside `model.safetensors`, or beside shards and their index."""

from __future__ import annotations

from typing import Any

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import InputError
from retnet_tools.formats.files import CheckpointFiles
from retnet_tools.formats.spec import FormatSpec, Reading, check_layer_count
from retnet_tools.formats.writer import CONFIG_FILE, FORMAT_NAME, FORMAT_VERSION, write_canonical
from retnet_tools.weights import canonical_shapes

__all__ = ["CANONICAL", "write_canonical"]


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
    if version != FORMAT_VERSION:
        raise InputError(f"{path} has format_version {version!r}", str(FORMAT_VERSION), "upgrade retnet-tools")
    config = RetNetConfig.from_dict(document.get("config", {}))
    check_layer_count(config, files.tensors)
    names = {name: name for name in canonical_shapes(config)}
    return Reading(config, f"{FORMAT_NAME} {version}", names, config_files=(path,))


def _document(files: CheckpointFiles) -> dict[str, Any]:
    return files.configs.get(files.folder / CONFIG_FILE, {})


CANONICAL = FormatSpec(
    name=FORMAT_NAME,
    looked_for=f'a {CONFIG_FILE} with "format": "{FORMAT_NAME}"',
    detect=detect,
    read=read,
)
