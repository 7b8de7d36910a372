"""Whether the forms of retention agree on a checkpoint, and if not, why."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from retnet_tools.errors import InputError, UsageError
from retnet_tools.jobs.request import shipped_checkpoint
from retnet_tools.jobs.verify_request import EXPORT_ALONE, VerifyRequest, is_exported
from retnet_tools.progress import Progress, no_progress

if TYPE_CHECKING:
    from retnet_tools.formats import CheckpointSource
    from retnet_tools.jobs.against import AgainstResult
    from retnet_tools.model.agreement import AgreementReport


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


def _export_and_source(request: VerifyRequest, source: CheckpointSource) -> tuple[Path, CheckpointSource]:
    """Which of the two is the exported folder, and the checkpoint, with all that was said of how to read it."""
    from retnet_tools.formats.hub import local_checkpoint
    from retnet_tools.graph.manifest import parse_manifest
    from retnet_tools.graph.targets import TARGET_FILES

    if request.against is None:
        return source.path, _recorded_source(request, source.path)
    first, second = source.path, local_checkpoint(str(request.against))
    exports = [path for path in (first, second) if is_exported(path)]
    if not exports:
        for path in (first, second):
            if any((path / name).is_file() for name in TARGET_FILES):
                parse_manifest(path)
    if len(exports) != 1:
        both = f"{first} and {second}"
        found = f"{both} are both exported folders" if exports else f"neither of {both} is an exported folder"
        raise UsageError(found, "a checkpoint, and an export of it")
    return exports[0], replace(source, path=second if exports[0] is first else first)


def _recorded_source(request: VerifyRequest, folder: Path) -> CheckpointSource:
    """The checkpoint that an export says it was made of.

    Raises:
        UsageError: it is not there any more as it was.
        InputError: the record is none.
    """
    from retnet_tools.formats.source_search import find_source
    from retnet_tools.graph.contract import MANIFEST_FILE
    from retnet_tools.graph.manifest import parse_manifest

    provenance = parse_manifest(folder).provenance
    try:
        hashes = {file["name"]: file["sha256"] for file in provenance["source_files"]}
        if any(Path(name).name != name for name in hashes):
            raise ValueError("names of files with folders")
    except (KeyError, TypeError, ValueError) as error:
        file = folder / MANIFEST_FILE
        found = f"{file} has provenance.source_files without name and sha256 of each"
        raise InputError(found, "what export writes", "name the checkpoint with --against") from error
    source = find_source(folder, hashes, [shipped_checkpoint()])
    if source is None:
        names = ", ".join(hashes) or "no files"
        raise UsageError(
            f"{folder} is an export, and its checkpoint ({names}, by their sha256) is not near it",
            "--against with the checkpoint",
        )
    return source
