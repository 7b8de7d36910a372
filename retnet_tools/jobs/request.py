"""What is asked of a job: frozen, checked at construction, and put down in its JSON document."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from retnet_tools.errors import InputError, UsageError, did_you_mean
from retnet_tools.fields import check_types

if TYPE_CHECKING:
    from retnet_tools.config import ScoreClamp
    from retnet_tools.formats import CheckpointSource


LEAST: dict[str, float] = {
    "batch": 1,
    "max_tokens": 1,
    "seed": 0,
    "text_tokens": 2,
    "threads": 1,
    "tokens": 1,
    "tolerance": 0.0,
}
"""By field, the least number that makes sense."""
SHIPPED = Path("the shipped checkpoint")
"""Where no checkpoint is named; an empty name is none."""


@dataclass(frozen=True)
class Request:
    """Fields as their annotations say; lists are taken as tuples, and one text where several may be as that one.

    Raises:
        UsageError: a value of another type, out of range, or one that does not go with another.
    """

    may_be_empty: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if "Sequence" in str(field.type) and isinstance(value, str | list):
                self.settle(**{field.name: (value,) if isinstance(value, str) else tuple(value)})
            if value == "" != field.default and field.name not in self.may_be_empty:
                raise UsageError(f"an empty {field.name.replace('_', ' ')}", "a value, or none at all")
        check_types(self)
        for name in LEAST.keys() & {field.name for field in dataclasses.fields(self)}:
            if (number := getattr(self, name)) is not None and number < LEAST[name]:
                raise UsageError(f"--{name.replace('_', '-')} {number}", f"at least {LEAST[name]:g}")

    def settle(self, **values: Any) -> None:
        """Put a value in the place of the words that stood for it."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """The request as plain data: what was asked for, and what was left out at its default."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


@dataclass(frozen=True)
class CheckpointRequest(Request):
    """A checkpoint to read.

    Attributes:
        checkpoint: a folder, a file, or a name on the hub.
        format: its format, if it is not to be detected.
        config: its configuration, where none lies beside the weights.
        entry: entry of a torch file with the weights: model_ema, ...
        clamp: its parallel form's clamp of scores, where the files do not tell: abs-of-sum or sum-of-abs.
        revision: branch, tag or commit, of a name on the hub.
        ignore_keys: configuration key that does not matter.
    """

    checkpoint: str | Path
    _: KW_ONLY
    format: str | None = None
    config: Path | str | None = None
    entry: str | None = None
    clamp: str | None = None
    revision: str | None = None
    ignore_keys: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clamp is not None:
            self.settle(clamp=parse_clamp(self.clamp))

    def source(self) -> CheckpointSource:
        """The checkpoint, or the exported folder, on this machine; a name on the hub is fetched now.

        Raises:
            UsageError: a revision of a path.
            InputError: a name on the hub that cannot be had.
        """
        from retnet_tools.formats import CheckpointSource
        from retnet_tools.formats.hub import local_checkpoint

        return CheckpointSource(
            local_checkpoint(str(self.checkpoint), self.revision),
            self.format,
            None if self.config is None else Path(self.config),
            self.entry,
            None if self.clamp is None else parse_clamp(self.clamp),
            self.revision,
            tuple(self.ignore_keys),
        )


@dataclass(frozen=True)
class CheckpointOrShipped(CheckpointRequest):
    """The same, or the small trained one inside the package.

    Attributes:
        checkpoint: a folder, a file, or a name on the hub; the shipped one if left out.
    """

    checkpoint: str | Path = SHIPPED

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint is SHIPPED:
            if self.revision is not None:
                found = f"--revision {self.revision} without a checkpoint"
                raise UsageError(found, "a name on the hub, such as org/name")
            self.settle(checkpoint=shipped_checkpoint())


def documentation(request: type[Request]) -> dict[str, str]:
    """What the documentation of a request, and of those that it builds on, says of each field, as a sentence."""
    texts: dict[str, str] = {}
    for kind in reversed(request.__mro__):
        for name, text in re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(kind) or "", re.MULTILINE):
            texts[name] = text[0].upper() + re.sub(r"\s+", " ", text[1:])
    return texts


def shipped_checkpoint() -> Path:
    """The trained checkpoint inside the package.

    Raises:
        InputError: this installation has none.
    """
    shipped = Path(str(resources.files("retnet_tools"))) / "data" / "shakespeare"
    if not shipped.is_dir():
        raise InputError("no checkpoint named and the shipped one is missing", str(shipped), "name a checkpoint")
    return shipped


def parse_clamp(text: str) -> ScoreClamp:
    """The clamp that a word names.

    Raises:
        UsageError: no clamp.
    """
    from retnet_tools.config import ScoreClamp

    clamps: dict[str, ScoreClamp] = {word.replace("_", "-"): word for word in get_args(ScoreClamp) if word != "none"}
    word = text.strip().lower().replace("_", "-")
    if word not in clamps:
        raise UsageError(f"--clamp {text}", f"one of {', '.join(clamps)}", did_you_mean(word, clamps))
    return clamps[word]


def parse_size(text: str | int) -> int:
    """Bytes from a number with a unit: 5GB, 500MB, 2GiB, or plain bytes.

    Raises:
        UsageError: anything else, or less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", str(text).strip().lower())
    if not match or (match[3] and not match[2]):
        raise UsageError(f"size {text!r}", "a number with a unit, such as 5GB, 500MB or 2GiB")
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " "))
    if size < 1:
        raise UsageError(f"size {text!r}", "at least one byte")
    return size


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
