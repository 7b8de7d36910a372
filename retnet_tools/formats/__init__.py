"""Checkpoint formats: `open_checkpoint` finds out which one a path is and gives a `Checkpoint`.

A new format is one file with one `FormatSpec`, and its name in `FORMATS`.
"""

from __future__ import annotations

from pathlib import Path

from retnet_tools.errors import ConfigError, InputError, UsageError, did_you_mean
from retnet_tools.formats.canonical import CANONICAL
from retnet_tools.formats.files import CheckpointFiles
from retnet_tools.formats.fla import FLA
from retnet_tools.formats.jamie_stirling import JAMIE_STIRLING
from retnet_tools.formats.spec import Checkpoint, FormatSpec, MappedWeights
from retnet_tools.formats.syncdoth import SYNCDOTH
from retnet_tools.formats.torchscale import TORCHSCALE
from retnet_tools.formats.yet_another_retnet import YET_ANOTHER_RETNET

__all__ = ["FORMATS", "Checkpoint", "FormatSpec", "open_checkpoint", "writable_format"]

FORMATS: tuple[FormatSpec, ...] = (CANONICAL, TORCHSCALE, SYNCDOTH, FLA, YET_ANOTHER_RETNET, JAMIE_STIRLING)


def open_checkpoint(path: Path | str, format: str | None = None) -> Checkpoint:
    """Open a checkpoint by its folder or its file of weights.

    Nothing in it is run. All names and shapes are checked here; tensor data is read later, one tensor at a time, so
    memory is bounded by the tensors that the caller holds, however large the checkpoint is.

    Args:
        path: a folder, or one file of weights whose configuration lies inside it or beside it.
        format: the name of one of `FORMATS`; None finds it from the files.

    Raises:
        InputError: missing, corrupt, unsafe, incomplete or of no known format.
        UsageError: `format` names no format.
    """
    files = CheckpointFiles(Path(path))
    spec = _find(files) if format is None else _named(format)
    try:
        reading = spec.read(files)
    except ConfigError as error:
        raise InputError(f"{files.path}: {error.found}", error.expected, error.action) from error
    except (OverflowError, RecursionError) as error:
        raise InputError(
            f"the configuration of {files.path} is out of range ({error})", "the numbers of a model", "correct it"
        ) from error
    weights = MappedWeights(files.tensors, reading)
    return Checkpoint(
        path=files.path,
        format=reading.version,
        config=reading.config,
        weights=weights,
        source_files=[*reading.config_files, *files.weight_files],
        tokenizer_files=files.tokenizer_files,
        notes=list(reading.notes),
        card_files=files.card_files,
        settings=files.configs.get(files.folder / "config.json", {}),
    )


def writable_format(name: str) -> FormatSpec:
    """The format of this name, for writing.

    Raises:
        UsageError: no such format, or one that cannot be written.
    """
    names = [spec.name for spec in FORMATS if spec.write is not None]
    if name not in names:
        raise UsageError(f"writing {name!r}", f"one of {', '.join(names)}", did_you_mean(name, names))
    return _named(name)


def _named(name: str) -> FormatSpec:
    names = [spec.name for spec in FORMATS]
    if name in names:
        return FORMATS[names.index(name)]
    raise UsageError(f"unknown format {name!r}", f"one of {', '.join(names)}", did_you_mean(name, names))


def _find(files: CheckpointFiles) -> FormatSpec:
    found = [spec for spec in FORMATS if spec.detect(files)]
    if len(found) == 1:
        return found[0]
    if found:
        names = [spec.name for spec in found]
        raise InputError(f"{files.path} could be {' or '.join(names)}", "one format", f"choose with --from {names[0]}")
    wanted = " | ".join(f"{spec.name}: {spec.looked_for}" for spec in FORMATS)
    raise InputError(f"no checkpoint of a known format in {files.path}", wanted, "name its folder or use --from")
