"""A checkpoint that a user named, and how it is to be read where its files do not say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from retnet_tools.config import ScoreClamp
from retnet_tools.formats import Checkpoint, open_checkpoint
from retnet_tools.formats.hub import local_checkpoint


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
