"""Whether the forms of retention agree on a checkpoint, and if not, why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from retnet_tools.errors import UsageError
from retnet_tools.jobs.request import CheckpointOrShipped
from retnet_tools.progress import Progress, no_progress

if TYPE_CHECKING:
    from retnet_tools.model.agreement import AgreementReport

VERIFY_CHUNK_SIZE = 48
"""Small, so that a few hundred tokens cross several boundaries and end in a shorter chunk."""
MODES = ("parallel", "recurrent", "chunkwise")


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
    threads: int | None = None

    def __post_init__(self) -> None:
        from retnet_tools.dtypes import parse_dtype
        from retnet_tools.model.agreement import select_forms

        if isinstance(self.modes, str):
            self.settle(modes=self.modes.split(","))
        super().__post_init__()
        self.settle(modes=tuple(word.strip().lower() for word in self.modes), dtype=parse_dtype(self.dtype))
        select_forms(self.modes, self.chunk_size)
        if self.text is not None and self.file is not None:
            raise UsageError("both --prompt and --file", "one of them")


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


def verify(request: VerifyRequest, progress: Progress = no_progress) -> VerifyResult:
    """Compare the forms on the same tokens `[B, T]`, and prefixes in each form continued in every other.

    Raises:
        UsageError: tokens that the model cannot take, or more than fit into memory.
        InputError: a checkpoint that cannot be read, or whose weights or logits are not finite.
    """
    from retnet_tools.dtypes import parse_dtype
    from retnet_tools.model.agreement import compare_forms, select_forms
    from retnet_tools.model.clamps import compare_clamps
    from retnet_tools.model.streaming import use_threads
    from retnet_tools.tokenizing.text_files import read_text
    from retnet_tools.tokenizing.token_ids import choose_tokens

    text = request.text if request.file is None else read_text(Path(request.file)).content
    opened = request.source().open()
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
