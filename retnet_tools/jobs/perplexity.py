"""How well a model predicts a text, and how far it is from a baseline on it."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from retnet_tools.errors import UsageError
from retnet_tools.jobs.request import CheckpointRequest
from retnet_tools.progress import Progress, no_progress

if TYPE_CHECKING:
    from retnet_tools.evaluate.perplexity import PerplexityReport


@dataclass(frozen=True)
class PerplexityRequest(CheckpointRequest):
    """A model and a text to score.

    Attributes:
        checkpoint: an exported folder, or a checkpoint: a folder, a file, or a name on the hub.
        text: file to score, in UTF-8; - reads stdin.
        against: baseline: an exported folder, or a checkpoint, run in fp32 on the CPU.
        context: tokens in a row; 0 reads the whole text in one, states carried.
        stride: predictions of a row that count, its last; half the context if left out.
        max_tokens: take only the first tokens.
        start_token: token to put before the text, such as '<|endoftext|>'.
        token_ids: the text is token ids.
        by_position: show whether errors grow with the context.
        batch: rows fed side by side.
        dtype: to run a checkpoint in: fp32, fp16, bf16 or fp64.
        device: of exports: cpu, cuda or cuda:N.
        cpu_fallback: run on the CPU what cannot run on CUDA, and say so.
        no_cuda_graph: run steps on CUDA kernel by kernel, not as captured graphs.
        threads: CPU threads to use; by the size of the work if left out.
    """

    text: Path | str = ""
    _: KW_ONLY
    against: str | Path | None = None
    context: int = 512
    stride: int | None = None
    max_tokens: int | None = None
    start_token: str | None = None
    token_ids: bool = False
    by_position: bool = False
    batch: int = 16
    dtype: str = "fp32"
    device: str = "cpu"
    cpu_fallback: bool = False
    no_cuda_graph: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        from retnet_tools.dtypes import parse_dtype
        from retnet_tools.evaluate.scoring import Windows
        from retnet_tools.runtime.providers import parse_device

        super().__post_init__()
        if not self.text:
            raise UsageError(
                "no text to score",
                "--text FILE, or --text - for stdin",
                "a play that the shipped model has not seen is fixtures/shakespeare/heldout.txt in the source tree",
            )
        self.settle(dtype=parse_dtype(self.dtype))
        Windows(self.context, self.stride)
        parse_device(self.device)


@dataclass(frozen=True)
class PerplexityResult:
    """The figures; see `retnet_tools.evaluate.perplexity.PerplexityReport`."""

    request: PerplexityRequest
    report: PerplexityReport


def perplexity(request: PerplexityRequest, progress: Progress = no_progress) -> PerplexityResult:
    """Score a text: perplexity and bits per byte, and against a baseline KL divergence and what else differs.

    Memory: logits `[batch, block, vocab]` of the model, and of the baseline.

    Raises:
        UsageError: a text that is too short, no tokenizer, or two models of different vocabularies or tokenizers.
        InputError, ProviderError: a model or a text that cannot be had, or logits that are not finite.
    """
    from retnet_tools.dtypes import parse_dtype
    from retnet_tools.evaluate.logits import is_export, open_logits
    from retnet_tools.evaluate.perplexity import measure_perplexity
    from retnet_tools.evaluate.scored_text import read_tokens
    from retnet_tools.evaluate.scoring import Windows
    from retnet_tools.formats import CheckpointSource
    from retnet_tools.runtime.providers import parse_device
    from retnet_tools.tokenizing.text_files import read_text

    content = read_text(Path(request.text)).content
    device = parse_device(request.device, cpu_fallback=request.cpu_fallback)
    graph = False if request.no_cuda_graph else None
    scored = open_logits(request.source(), device, request.threads, parse_dtype(request.dtype), cuda_graph=graph)
    baseline = None
    if request.against is not None:
        other = CheckpointSource.of(request.against)
        where = device if is_export(other.path) else parse_device("cpu")
        baseline = open_logits(other, where, request.threads, cuda_graph=graph)
    tokens = read_tokens(
        content,
        scored,
        baseline,
        token_ids=request.token_ids,
        start_token=request.start_token,
        limit=request.max_tokens,
    )
    report = measure_perplexity(
        scored,
        tokens,
        Windows(request.context, request.stride),
        baseline=baseline,
        batch=request.batch,
        positions=request.by_position,
        progress=progress,
    )
    return PerplexityResult(request, report)
