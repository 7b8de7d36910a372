"""A checkpoint from any format to any that can be written."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from retnet_tools.errors import InputError, OutputError
from retnet_tools.jobs.request import CheckpointRequest, parse_size
from retnet_tools.progress import Progress, in_megabytes, no_progress

if TYPE_CHECKING:
    from retnet_tools.formats import Checkpoint
    from retnet_tools.formats.conversion import Conversion


@dataclass(frozen=True)
class ConvertRequest(CheckpointRequest):
    """A checkpoint to write in another format.

    Attributes:
        output: folder to make.
        to: format to write: canonical, torchscale, syncdoth or fla.
        dtype: type to store: fp32, fp16, bf16 or fp64; as stored if left out.
        max_shard_size: bytes in one file, such as 5GB.
        force: replace a checkpoint that is there.
        dry_run: say what would be written with sizes, names and memory, and stop.
    """

    output: Path | str
    _: KW_ONLY
    to: str = "canonical"
    dtype: str | None = None
    max_shard_size: str | int = "5GB"
    force: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        from retnet_tools.dtypes import parse_dtype
        from retnet_tools.formats import writable_format

        super().__post_init__()
        writable_format(self.to)
        self.settle(max_shard_size=parse_size(self.max_shard_size))
        if self.dtype is not None:
            self.settle(dtype=parse_dtype(self.dtype))


@dataclass(frozen=True)
class ConvertResult:
    """What was written, or would be.

    Attributes:
        checkpoint: what was read.
        conversion: the files, their tensors and what to note about them.
    """

    request: ConvertRequest
    checkpoint: Checkpoint = field(repr=False)
    conversion: Conversion = field(repr=False)

    @property
    def folder(self) -> Path:
        """Where it was written."""
        return Path(self.request.output)


def convert(request: ConvertRequest, progress: Progress = no_progress) -> ConvertResult:
    """Write a checkpoint in another format, bit for bit unless its type changes; one tensor in memory at a time.

    Raises:
        UsageError: a model that the format cannot express, or an output that exists.
        InputError: a checkpoint that cannot be read.
        OutputError: an output that cannot be written; nothing is left behind.
    """
    from retnet_tools.dtypes import parse_dtype
    from retnet_tools.formats import writable_format
    from retnet_tools.formats.conversion import plan_checkpoint, write_checkpoint

    checkpoint = request.source().open()
    plan = plan_checkpoint(
        checkpoint,
        writable_format(request.to),
        dtype=None if request.dtype is None else parse_dtype(request.dtype),
        max_shard_size=parse_size(request.max_shard_size),
    )
    if not request.dry_run:
        folder, told = Path(request.output), in_megabytes(progress, "convert", plan.nbytes)
        _check_output(folder, plan.marker, force=request.force)
        write_checkpoint(folder, plan, force=request.force, progress=told)
    return ConvertResult(request, checkpoint, plan)


def _check_output(folder: Path, marker: str, *, force: bool) -> None:
    """Check that a folder may be written, and that what is replaced is a RetNet: other models have a config.json too.

    Raises:
        UsageError, OutputError: it may not, or is something else.
    """
    from retnet_tools.formats import open_checkpoint
    from retnet_tools.formats.files import CONFIG_NAMES
    from retnet_tools.replacing import is_being_replaced
    from retnet_tools.staging import check_folder

    check_folder(folder, marker=marker, force=force, ours=CONFIG_NAMES)
    if not is_being_replaced(folder) and any((folder / name).is_file() for name in CONFIG_NAMES):
        try:
            open_checkpoint(folder)
        except InputError as error:
            raise OutputError(
                f"{folder} holds something else than a RetNet checkpoint ({error.found})", action="remove it yourself"
            ) from error
