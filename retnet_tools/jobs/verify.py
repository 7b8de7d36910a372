"""Whether the forms of retention agree on a checkpoint, and if not, why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from retnet_tools.errors import UsageError
from retnet_tools.jobs.request import CheckpointOrShipped, shipped_checkpoint
from retnet_tools.progress import Progress, no_progress

if TYPE_CHECKING:
    from retnet_tools.formats import CheckpointSource
    from retnet_tools.jobs.against import AgainstResult
    from retnet_tools.model.agreement import AgreementReport

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
        return self.against is not None or _is_export(Path(self.checkpoint))

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


@dataclass(frozen=True)
class VerifyResult:
    """What the forms gave.

    Attributes:
        checkpoint: where it lies.
        tokens: where the tokens came from, in words.
        notes: what was said on reading the checkpoint.
        report: every pair of forms, every hand-off between two, and the budget.
    """

    request: VerifyRequest = field(repr=False)
    checkpoint: Path
    tokens: str
    notes: tuple[str, ...]
    report: AgreementReport = field(repr=False)

    @property
    def passed(self) -> bool:
        """Whether every difference is within its budget."""
        return self.report.passed

    def require(self) -> None:
        """Do nothing for forms that agree.

        Raises:
            VerificationError: the worst difference over its budget, its cause and what to do.
        """
        from retnet_tools.model.agreement import require_agreement

        require_agreement(self.report)


def verify(request: VerifyRequest, progress: Progress = no_progress) -> VerifyResult | AgainstResult:
    """Compare the forms on the same tokens `[B, T]`, and prefixes in each form continued in every other; or hold an
    exported folder to its checkpoint, where `checkpoint` or `against` is one.

    Raises:
        UsageError: tokens that the model cannot take, or more than fit into memory; an export whose checkpoint is not
            found, or options that do not go together.
        InputError: a checkpoint, an export or a budget that cannot be read, or weights or logits that are not finite.
        ProviderError: the device cannot be had.
    """
    source = request.source()
    if request.holds_export:
        from retnet_tools.jobs.against import verify_against

        request.check_fits_export()
        return verify_against(request, *_export_and_source(request, source), progress)
    for name, default in EXPORT_ALONE.items():
        if getattr(request, name) != default:
            raise UsageError(f"--{name} for a checkpoint alone", "--against with an exported folder")
    return _compare_forms(request, source, progress)


def _compare_forms(request: VerifyRequest, source: CheckpointSource, progress: Progress) -> VerifyResult:
    from retnet_tools.dtypes import parse_dtype
    from retnet_tools.model.agreement import compare_forms, select_forms
    from retnet_tools.model.clamps import compare_clamps
    from retnet_tools.model.streaming import use_threads
    from retnet_tools.tokenizing.text_files import read_text
    from retnet_tools.tokenizing.token_ids import choose_tokens

    text = request.text if request.file is None else read_text(Path(request.file)).content
    opened = source.open()
    chosen = choose_tokens(opened.config, opened.tokenizer_files, text, length=request.tokens, seed=request.seed)
    use_threads(opened.config, chosen.ids.shape[0] * chosen.ids.shape[1], request.threads)
    report = (compare_clamps if opened.assumed_clamp else compare_forms)(
        opened.config,
        opened.weights,
        chosen.ids,
        select_forms(request.modes, request.chunk_size),
        dtype=parse_dtype(request.dtype),
        tolerance=request.tolerance,
        progress=progress,
    )
    return VerifyResult(request, opened.path, chosen.source, tuple(opened.notes), report)


def _is_export(path: Path) -> bool:
    from retnet_tools.graph.contract import MANIFEST_FILE

    return (path / MANIFEST_FILE).is_file()


def _export_and_source(request: VerifyRequest, source: CheckpointSource) -> tuple[Path, CheckpointSource]:
    """Which of the two is the exported folder, and the checkpoint, with all that was said of how to read it."""
    from retnet_tools.formats.hub import local_checkpoint

    if request.against is None:
        return source.path, _recorded_source(request, source.path)
    first, second = source.path, local_checkpoint(str(request.against))
    exports = [path for path in (first, second) if _is_export(path)]
    if len(exports) != 1:
        both = f"{first} and {second}"
        found = f"{both} are both exported folders" if exports else f"neither of {both} is an exported folder"
        raise UsageError(found, "a checkpoint, and an export of it")
    return exports[0], replace(source, path=second if exports[0] is first else first)


def _recorded_source(request: VerifyRequest, folder: Path) -> CheckpointSource:
    """The checkpoint that an export says it was made of.

    Raises:
        UsageError: it is not there any more as it was.
    """
    from retnet_tools.formats.source_search import find_source
    from retnet_tools.graph.manifest import parse_manifest

    record = parse_manifest(folder).provenance["source_files"]
    found = find_source(folder, record, [shipped_checkpoint()])
    if found is None:
        names = ", ".join(file["name"] for file in record) or "no files"
        raise UsageError(
            f"{folder} is an export, and its checkpoint ({names}, by their sha256) is not near it",
            "--against with the checkpoint",
        )
    return found
