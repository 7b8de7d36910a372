"""Whether the forms of retention agree on a checkpoint, and if not, why.

Every pair of forms runs on the same tokens three times: in the dtype asked for (difference d), in float64 (d64), and
in float64 with the head-norm epsilon at zero (d0). What is left in d0 is `logic`; what d64 adds to it is
`normalisation-epsilon` (the parallel form divides scores by a data-dependent clamp that the recurrence cannot know,
and the head norm cancels a divisor exactly only without its epsilon); what d adds to d64 is `rounding`.

Memory: the model once, in the widest dtype in use (float64: 8 bytes a parameter), and for each form its logits and
hidden states, B x T x (vocab + layers x D) numbers.

Where scores are not clamped there is no such epsilon: d0 is d64. A stack without a head is judged by its last hidden
states in place of logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count, product
from math import inf
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from retnet_tools.config import RetNetConfig, ScoreClamp
from retnet_tools.dtypes import FloatName
from retnet_tools.errors import UsageError, VerificationError, did_you_mean
from retnet_tools.model.budgets import ACTIONS, Budget, Cause, cause_of
from retnet_tools.model.retention import FORMS, RetentionForm, retention_chunkwise
from retnet_tools.model.retnet import RetNet, load_model
from retnet_tools.model.runs import Difference, check_run_memory, max_abs_difference, require_finite, run_forms
from retnet_tools.progress import Progress, no_progress
from retnet_tools.weights import FiniteWeights, WeightSource

HANDOFF_TOKENS = 64


@dataclass(frozen=True)
class Comparison:
    """Two forms on the same tokens: in the dtype asked for, in float64, and in float64 with head-norm epsilon 0.

    Attributes:
        cause: what explains most of the difference.
        exceeded: the cause whose part is over its budget, or None.
    """

    a: str
    b: str
    run: Difference
    float64: Difference
    float64_eps0: Difference
    cause: Cause
    exceeded: Cause | None

    @property
    def passed(self) -> bool:
        """Whether every cause's part is within its budget."""
        return self.exceeded is None

    @property
    def first_layer(self) -> int | None:
        """The first layer that differs, judged in the run that shows the cause."""
        shown = {"rounding": self.run, "normalisation-epsilon": self.float64, "logic": self.float64_eps0}
        return shown[self.cause].first_layer


@dataclass(frozen=True)
class Handoff:
    """A prefix in one form, continued in another, against the full run of the latter; float64, epsilon 0."""

    prefix_form: str
    continue_form: str
    prefix_length: int
    max_abs: float
    passed: bool


@dataclass(frozen=True)
class ClampFit:
    """How far the parallel form under a clamp is from another form, in the dtype asked for and in float64."""

    clamp: ScoreClamp
    against: str
    run: float
    float64: float


@dataclass(frozen=True)
class AgreementReport:
    """What `compare_forms` found.

    Attributes:
        logits_scale: the largest |logit| in float64.
        clamps: the clamps that were tried; empty where the checkpoint tells its own.
        clamp: the one of these that fits best, whose parallel form is in the comparisons.
    """

    dtype: FloatName
    rows: int
    tokens: int
    logits_scale: float
    budget: Budget
    comparisons: tuple[Comparison, ...]
    handoffs: tuple[Handoff, ...]
    notes: tuple[str, ...]
    clamps: tuple[ClampFit, ...] = ()
    clamp: ScoreClamp | None = None

    @property
    def passed(self) -> bool:
        """Whether every comparison and every hand-off is within budget."""
        return all(c.passed for c in self.comparisons) and all(h.passed for h in self.handoffs)


def select_forms(names: Iterable[str], chunk_size: int) -> dict[str, RetentionForm]:
    """The forms of these names, `chunkwise` with this chunk size.

    Raises:
        UsageError: an unknown name, fewer than two different ones, or a chunk size below 1.
    """
    if chunk_size < 1:
        raise UsageError(f"chunk size {chunk_size}", "at least 1")
    known: dict[str, RetentionForm] = {**FORMS, "chunkwise": partial(retention_chunkwise, chunk_size=chunk_size)}
    names = [name.strip().lower() for name in names]
    for name in names:
        if name not in known:
            raise UsageError(f"unknown form {name!r}", f"some of {', '.join(known)}", did_you_mean(name, known))
    if len(set(names)) < 2:
        raise UsageError(f"form {', '.join(sorted(set(names))) or 'none'} alone", f"two or more of {', '.join(known)}")
    return {name: known[name] for name in names}


def compare_forms(
    config: RetNetConfig,
    weights: WeightSource,
    inputs: npt.NDArray[Any],
    forms: Mapping[str, RetentionForm],
    *,
    dtype: FloatName = "float32",
    tolerance: float | None = None,
    progress: Progress = no_progress,
) -> AgreementReport:
    """Compare every pair of forms on token ids `[B, T]`, and every hand-off between two of them.

    A stack without an embedding takes embeddings `[B, T, D]`.

    Raises:
        UsageError: fewer than two forms, no tokens, tokens outside the vocabulary, more tokens than fit into memory, a
            negative tolerance.
        InputError: weights that do not fit the configuration or are not finite; logits that are not finite in float64,
            so that there is nothing to compare.
    """
    _check_arguments(config, inputs, forms, tolerance)
    check_run_memory(config, inputs.shape[0], inputs.shape[1], forms)
    weights = FiniteWeights(weights)
    ids = torch.from_numpy(inputs)
    clamped = config.score_normalization.clamp != "none"
    done, total = count(), len(forms) * (1 + clamped + (dtype != "float64")) + 1

    def begin(what: str) -> None:
        progress(what, next(done), total)

    run = None
    if dtype != "float64":
        run = run_forms(load_model(config, weights, getattr(torch, dtype)), ids, forms, begin, dtype)
    model = load_model(config, weights, torch.float64)
    float64 = eps0 = run_forms(model, ids, forms, begin, "float64")
    require_finite(float64)
    exact = model
    if clamped:
        exact = _without_epsilon(model)
        eps0 = run_forms(exact, ids, forms, begin, "float64, epsilon 0")
        require_finite(eps0)
    run = run or float64
    budget = Budget.of(dtype, float64.scale, tolerance)
    comparisons = tuple(
        _compare(a, b, run.pairs[a, b], float64.pairs[a, b], eps0.pairs[a, b], budget) for a, b in run.pairs
    )
    begin("hand-offs")
    handoffs = tuple(_handoffs(exact, ids[:1], forms, eps0.first_row, budget))
    notes = (*_notes(config, ids, forms), *dict.fromkeys((*run.notes, *float64.notes, *eps0.notes)))
    rows, tokens = ids.shape[:2]
    return AgreementReport(dtype, rows, tokens, float64.scale, budget, comparisons, handoffs, notes)


def require_agreement(report: AgreementReport) -> None:
    """Do nothing for a report that passed.

    Raises:
        VerificationError: the worst difference over budget, its cause and what to do.
    """
    for c in sorted(report.comparisons, key=lambda c: (c.exceeded != "logic", -c.run.max_abs)):
        if c.exceeded is not None:
            where = "" if c.first_layer is None else f", from layer {c.first_layer} on"
            raise VerificationError(
                f"{c.a} and {c.b} differ by {c.run.max_abs:.1e} in logits at {report.dtype} ({c.exceeded}{where})",
                report.budget.limit(c.exceeded),
                ACTIONS[c.exceeded],
            )
    for h in report.handoffs:
        if not h.passed:
            raise VerificationError(
                f"{h.prefix_length} tokens in {h.prefix_form}, continued in {h.continue_form}, differ by "
                f"{h.max_abs:.1e} from one run in {h.continue_form} (float64, epsilon 0)",
                report.budget.limit("logic"),
                "do not continue one of these forms in the other",
            )


def prefix_lengths(tokens: int) -> list[int]:
    """Where a run is cut: after the first token, at a third, at the middle and before the last token."""
    return sorted({p for p in (1, tokens // 3, tokens // 2, tokens - 1) if 0 < p < tokens})


@torch.inference_mode()
def _handoffs(
    model: RetNet, ids: Tensor, forms: Mapping[str, RetentionForm], full: Mapping[str, Tensor], budget: Budget
) -> Iterable[Handoff]:
    for p, a in product(prefix_lengths(ids.shape[1]), forms):
        states = model(ids[:, :p], form=forms[a]).states
        rest = slice(p, p + HANDOFF_TOKENS)
        for b in forms:
            logits = model(ids[:, rest], form=forms[b], states=states, position=p).logits
            apart = max_abs_difference(logits, full[b][:, rest])
            yield Handoff(a, b, p, apart, apart <= budget.logic)


def _without_epsilon(model: RetNet) -> RetNet:
    """The same parameters, shared, under a head-norm epsilon of zero."""
    with torch.device("meta"):
        exact = RetNet(model.config.with_head_norm_eps(0.0))
    exact.load_state_dict(model.state_dict(), assign=True)
    return exact.eval()


def _compare(a: str, b: str, run: Difference, float64: Difference, eps0: Difference, budget: Budget) -> Comparison:
    d, d64, d0 = run.max_abs, float64.max_abs, eps0.max_abs
    return Comparison(a, b, run, float64, eps0, cause_of(d, d64, d0, budget), budget.exceeded(d, d64, d0))


def _notes(config: RetNetConfig, ids: Tensor, forms: Mapping[str, RetentionForm]) -> Iterable[str]:
    if config.head_norm.kind == "none" and config.score_normalization.clamp != "none" and "parallel" in forms:
        yield "the scores are clamped and no head norm cancels that: no recurrence computes this parallel form"
    chunk = forms.get("chunkwise")
    if isinstance(chunk, partial) and chunk.keywords.get("chunk_size", 0) >= ids.shape[1]:
        yield f"{ids.shape[1]} tokens fit into one chunk: no chunk boundary was crossed"


def _check_arguments(
    config: RetNetConfig, inputs: npt.NDArray[Any], forms: Mapping[str, RetentionForm], tolerance: float | None
) -> None:
    if len(forms) < 2:
        raise UsageError(f"{len(forms)} forms to compare", "two or more")
    expected = [] if config.has_vocabulary else [config.hidden_size]
    if list(inputs.shape[2:]) != expected or inputs.ndim < 2 or inputs.size == 0:
        wanted = ", ".join(["rows", "tokens", *map(str, expected)])
        raise UsageError(f"tokens of shape {list(inputs.shape)}", f"[{wanted}], at least one of each")
    if config.has_vocabulary and (inputs.min() < 0 or inputs.max() >= config.vocab_size):
        raise UsageError(f"token {inputs.max()}", f"0 to {config.vocab_size - 1}, the vocabulary of the checkpoint")
    if tolerance is not None and not 0 <= tolerance < inf:
        raise UsageError(f"tolerance {tolerance}", "a finite number >= 0")
