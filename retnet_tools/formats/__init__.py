"""Checkpoint formats: `open_checkpoint` finds out which one a path is and gives a `Checkpoint`.

A new format is one file with one `FormatSpec`, and its row in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from retnet_tools.config import RetNetConfig, ScoreClamp
from retnet_tools.console import LOG
from retnet_tools.errors import ConfigError, InputError, UsageError, did_you_mean
from retnet_tools.formats.canonical import CANONICAL
from retnet_tools.formats.files import CheckpointFiles
from retnet_tools.formats.fla import FLA
from retnet_tools.formats.hub import local_checkpoint
from retnet_tools.formats.jamie_stirling import JAMIE_STIRLING
from retnet_tools.formats.mapping import map_weights
from retnet_tools.formats.reading import find_format, read_source
from retnet_tools.formats.spec import Checkpoint, FormatSpec, Reading
from retnet_tools.formats.syncdoth import SYNCDOTH
from retnet_tools.formats.syncdoth_first import SYNCDOTH_FIRST
from retnet_tools.formats.torchscale import TORCHSCALE
from retnet_tools.formats.torchscale_wrapped import TORCHSCALE_HUGGING_FACE, TORCHSCALE_STUDENT
from retnet_tools.formats.xatl import XATL, XATL_LIT
from retnet_tools.formats.yet_another_retnet import YET_ANOTHER_RETNET

__all__ = ["FORMATS", "Checkpoint", "CheckpointSource", "FormatSpec", "open_checkpoint", "writable_format"]

FORMATS: tuple[FormatSpec, ...] = (
    CANONICAL,
    TORCHSCALE,
    TORCHSCALE_HUGGING_FACE,
    TORCHSCALE_STUDENT,
    SYNCDOTH,
    SYNCDOTH_FIRST,
    XATL,
    XATL_LIT,
    FLA,
    YET_ANOTHER_RETNET,
    JAMIE_STIRLING,
)
CLAMP_NOTE = (
    "these files do not tell which clamp of the scores the parallel form has: {clamp} is assumed; verify tries both, "
    "and --clamp names it"
)


def open_checkpoint(
    path: Path | str,
    format: str | None = None,
    *,
    config: Path | None = None,
    entry: str | None = None,
    clamp: ScoreClamp | None = None,
    ignore_keys: Collection[str] = (),
) -> Checkpoint:
    """Open a checkpoint by its folder or its file of weights.

    Nothing in it is run. All names and shapes are checked here; tensor data is read later, one tensor at a time, so
    memory is bounded by the tensors that the caller holds, however large the checkpoint is.

    Args:
        path: a folder, or one file of weights whose configuration lies inside it or beside it.
        format: the name of one of `FORMATS`; None finds it from the files.
        config: the file of the configuration, where it is none of these.
        entry: which entry of a torch file holds the weights, where there are several.
        clamp: the clamp of the scores that the model was trained with, where the files do not tell.
        ignore_keys: configuration keys that do not change the model, though the format does not know them.

    Raises:
        InputError: missing, corrupt, unsafe, incomplete or of no known format.
        UsageError: `format` names no format, or `clamp` is not what the files tell.
    """
    files = CheckpointFiles(Path(path), config=config, entry=entry)
    spec = find_format(files, FORMATS) if format is None else _named(format, FORMATS, f"unknown format {format!r}")
    try:
        source = read_source(spec, files, ignore_keys)
        reading = spec.read(source)
    except ConfigError as error:
        raise InputError(f"{files.path}: {error.found}", error.expected, error.action) from error
    except (OverflowError, RecursionError) as error:
        found = f"the configuration of {files.path} is out of range ({error})"
        raise InputError(found, "the numbers of a model", "correct it") from error
    assumed = reading.assumed_clamp and clamp is None
    LOG.debug("%s is %s", files.path, reading.version)
    clamp_note = [CLAMP_NOTE.format(clamp=reading.config.score_normalization.clamp)] if assumed else []
    return Checkpoint(
        path=files.path,
        format=reading.version,
        config=reading.config if clamp is None else _with_clamp(reading, clamp),
        weights=map_weights(source.stored, reading, source.prefix),
        source_files=[file for file in (source.document.file, *files.weight_files) if file is not None],
        tokenizer_files=files.tokenizer_files,
        notes=[*files.notes, *source.notes, *source.settings.notes(), *clamp_note],
        card_files=files.card_files,
        settings=source.document.values,
        assumed_clamp=assumed,
    )


@dataclass(frozen=True)
class CheckpointSource:
    """What `open_checkpoint` takes, by its names, and the revision of what came from the hub."""

    path: Path
    format: str | None = None
    config: Path | None = None
    entry: str | None = None
    clamp: ScoreClamp | None = None
    revision: str | None = None
    ignore_keys: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str | Path, revision: str | None = None) -> CheckpointSource:
        """A path or a name on the hub, which is fetched now; raises as `local_checkpoint`."""
        return cls(local_checkpoint(str(name), revision), revision=revision)

    @property
    def says_how(self) -> bool:
        """Whether more is said than where it lies, so that it cannot be an exported folder."""
        return any((self.format, self.config, self.entry, self.clamp, self.ignore_keys))

    def open(self) -> Checkpoint:
        """The checkpoint; raises as `open_checkpoint`."""
        return open_checkpoint(
            self.path, self.format, config=self.config, entry=self.entry, clamp=self.clamp, ignore_keys=self.ignore_keys
        )


def _with_clamp(reading: Reading, clamp: ScoreClamp) -> RetNetConfig:
    scores = reading.config.score_normalization
    if not reading.assumed_clamp and clamp != scores.clamp:
        named, used = (name.replace("_", "-") for name in (clamp, scores.clamp))
        raise UsageError(f"--clamp {named}", f"{used}, which {reading.version} uses", "leave --clamp out")
    return replace(reading.config, score_normalization=replace(scores, clamp=clamp))


def writable_format(name: str) -> FormatSpec:
    """The format of this name, for writing.

    Raises:
        UsageError: no such format, or one that cannot be written.
    """
    return _named(name, [spec for spec in FORMATS if spec.write is not None], f"writing {name!r}")


def _named(name: str, formats: Sequence[FormatSpec], found: str) -> FormatSpec:
    known = {spec.name: spec for spec in formats}
    if name not in known:
        raise UsageError(found, f"one of {', '.join(known)}", did_you_mean(name, known))
    return known[name]
