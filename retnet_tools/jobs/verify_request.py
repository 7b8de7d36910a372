"""What is asked of `verify`: a checkpoint whose forms are compared, or an exported folder that is held to its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import ClassVar

from retnet_tools.errors import UsageError
from retnet_tools.jobs.request import CheckpointOrShipped

VERIFY_CHUNK_SIZE = 48
"""Small, so that a few hundred tokens cross several boundaries and end in a shorter chunk."""
MODES = ("parallel", "recurrent", "chunkwise")
FORMS_ALONE = {"modes": MODES, "dtype": "float32", "tolerance": None, "chunk_size": VERIFY_CHUNK_SIZE}
"""What says how forms are compared, and does not go with an export; and what it is where nothing is said."""
EXPORT_ALONE = {"budget": None, "device": "cpu"}
"""The same of what goes with an export only."""


@dataclass(frozen=True)
class VerifyRequest(CheckpointOrShipped):
    """A checkpoint to run in its forms.

    Attributes:
        modes: two or more of parallel, recurrent and chunkwise.
        dtype: type to run in: fp32, fp16, bf16 or fp64; float64 runs besides, to tell rounding from the rest.
        tolerance: largest difference in logits by rounding and epsilon, in place of the budgets by dtype. A difference
            that is logic, or of a hand-off, fails all the same.
        chunk_size: tokens in a chunk of the chunkwise form.
        tokens: tokens to run, two rows of random ones, or of the text to use.
        seed: seed of the random tokens.
        text: text to run on, in place of random tokens.
        file: run on the text of this file; - reads stdin.
        against: the other of a checkpoint and its exported folder, to hold that to the checkpoint; for an export alone
            the checkpoint is looked for by its record.
        budget: file of what may differ, in TOML, in place of the default.
        device: of an export: cpu, cuda or cuda:N.
        threads: CPU threads to use; by the size of the work if left out.
    """

    may_be_empty: ClassVar[tuple[str, ...]] = ("text",)

    _: KW_ONLY
    modes: Sequence[str] = MODES
    dtype: str = "fp32"
    tolerance: float | None = None
    chunk_size: int = VERIFY_CHUNK_SIZE
    tokens: int = 256
    seed: int = 0
    text: str | None = None
    file: Path | str | None = None
    against: str | Path | None = None
    budget: Path | str | None = None
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        from retnet_tools.dtypes import parse_dtype
        from retnet_tools.model.agreement import select_forms
        from retnet_tools.runtime.providers import parse_device

        if isinstance(self.modes, str):
            self.settle(modes=self.modes.split(","))
        super().__post_init__()
        self.settle(modes=tuple(word.strip().lower() for word in self.modes), dtype=parse_dtype(self.dtype))
        select_forms(self.modes, self.chunk_size)
        if self.text is not None and self.file is not None:
            raise UsageError("both --prompt and --file", "one of them")
        parse_device(self.device)
        if self.against is not None:
            self.check_fits_export()

    @property
    def holds_export(self) -> bool:
        """Whether an exported folder is to be held to its checkpoint."""
        return self.against is not None or is_exported(Path(self.checkpoint))

    def check_fits_export(self) -> None:
        """Refuse what says how forms are compared, where an export is held to its checkpoint.

        Raises:
            UsageError: an option that does not go with that.
        """
        for name, default in FORMS_ALONE.items():
            if getattr(self, name) != default:
                raise UsageError(
                    f"--{name.replace('_', '-')} with an exported folder",
                    "a checkpoint alone",
                    "an export has graphs, types and chunks of its own",
                )


def is_exported(path: Path) -> bool:
    """Whether a path is an exported folder."""
    from retnet_tools.graph.contract import MANIFEST_FILE

    return (path / MANIFEST_FILE).is_file()
