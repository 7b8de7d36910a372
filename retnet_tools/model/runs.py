"""One model on the same tokens in several forms: whether that fits into memory, and what every pair differs by."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import InputError, UsageError
from retnet_tools.machine import available_memory
from retnet_tools.model.retention import RetentionForm, retention_parallel
from retnet_tools.model.retnet import RetNet, RetNetOutput

_LAYER_LEVELS = {torch.float64: 1e-11, torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_FLOAT64 = 8


@dataclass(frozen=True)
class Difference:
    """What separates two runs on the same tokens, measured in float64.

    Attributes:
        max_abs: max |a - b| over all logits.
        max_rel: max_abs / max |a|, so that a logit near zero does not decide.
        kl_mean: mean over positions of KL(softmax a || softmax b), in nats; None for a stack without a head.
        top1_agreement: part of the positions where both runs rank the same token first, which logits that are not
            finite do not; None likewise.
        layers: max |a - b| of each layer's output.
        first_layer: the first layer whose output differs by more than rounding explains (a part of its largest
            value, by dtype), or None.
    """

    max_abs: float
    max_rel: float
    kl_mean: float | None
    top1_agreement: float | None
    layers: tuple[float, ...]
    first_layer: int | None


@dataclass(frozen=True)
class Run:
    """One model on all forms.

    Attributes:
        pairs: the differences of every pair of forms.
        first_row: each form's logits of the first row `[1, T, vocab]`.
        scale: the largest |logit|.
        overflowed: the forms with logits that are not finite.
        label: dtype and epsilon, for people.
    """

    pairs: dict[tuple[str, str], Difference]
    first_row: dict[str, Tensor]
    scale: float
    overflowed: tuple[str, ...]
    label: str

    @property
    def notes(self) -> list[str]:
        """Which forms give logits that are not finite."""
        return [f"the {name} form gives logits that are not finite in {self.label}" for name in self.overflowed]


@torch.inference_mode()
def run_forms(
    model: RetNet, ids: Tensor, forms: Mapping[str, RetentionForm], begin: Callable[[str], None], label: str
) -> Run:
    """Run a model on token ids `[B, T]` in every form, each announced by `begin`, and compare the pairs."""
    outputs = {}
    for name, form in forms.items():
        begin(f"{name}, {label}")
        outputs[name] = model(ids, form=form, keep_hidden=True)
    return Run(
        pairs={
            (a, b): difference(outputs[a], outputs[b], model.config.has_vocabulary) for a, b in combinations(outputs, 2)
        },
        first_row={name: output.logits[:1].clone() for name, output in outputs.items()},
        scale=max(max_abs(output.logits) for output in outputs.values()),
        overflowed=tuple(name for name, output in outputs.items() if not output.logits.isfinite().all()),
        label=label,
    )


def require_finite(run: Run) -> None:
    """Refuse a float64 run in which two forms have logits that are not finite: nothing tells these two apart.

    Raises:
        InputError: so it is; the weights are too large, since they are finite and no narrow type is to blame.
    """
    if len(run.overflowed) > 1:
        raise InputError(
            f"the forms {' and '.join(run.overflowed)} give logits that are not finite in {run.label}",
            "weights that float64 can compute with",
            "look at them with inspect",
        )


def difference(a: RetNetOutput, b: RetNetOutput, distributions: bool = True) -> Difference:
    """Compare two runs that kept their hidden states; a value that is not finite makes `max_abs` not finite.

    `distributions` tells whether the logits mean any.
    """
    largest, apart = max_abs(a.logits), max_abs_difference(a.logits, b.logits)
    hidden = list(zip(a.hidden_states[1:], b.hidden_states[1:], strict=True))
    layers = tuple(max_abs_difference(x, y) for x, y in hidden)
    differing = (i for i, (x, _) in enumerate(hidden) if not layers[i] <= _LAYER_LEVELS[x.dtype] * max_abs(x))
    return Difference(
        max_abs=apart,
        max_rel=apart / largest if largest else apart,
        kl_mean=_kl_mean(a.logits, b.logits) if distributions else None,
        top1_agreement=_top1_agreement(a.logits, b.logits) if distributions else None,
        layers=layers,
        first_layer=next(differing, None),
    )


def max_abs(x: Tensor) -> float:
    """max |x| as a float."""
    return x.abs().max().double().item()


def max_abs_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| in float64, a row of the batch at a time; NaN where a value is not finite on both sides."""
    rows = [(x.double() - y.double()).abs().max() for x, y in zip(a, b, strict=True)]
    return torch.stack(rows).max().item()


def _top1_agreement(a: Tensor, b: Tensor) -> float:
    same = a.argmax(-1) == b.argmax(-1)
    return (same & a.isfinite().all(-1) & b.isfinite().all(-1)).double().mean().item()


def _kl_mean(a: Tensor, b: Tensor) -> float:
    """Mean KL(a || b) over positions; a row of the batch at a time bounds memory."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        log_p, log_q = x.double().log_softmax(-1), y.double().log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    return total / len(a) if not total < 0 else 0.0


def check_run_memory(config: RetNetConfig, rows: int, tokens: int, forms: Mapping[str, RetentionForm]) -> None:
    """Refuse more tokens than the memory that is available can hold; do nothing where that is not known.

    Raises:
        UsageError: too many, with the number that fits.
    """
    available = available_memory()
    needed = estimated_memory(config, rows, tokens, forms)
    if available is None or needed <= available:
        return
    fitting = bisect_right(
        range(1, tokens + 1), available, key=lambda count: estimated_memory(config, rows, count, forms)
    )
    parallel = retention_parallel in forms.values()
    raise UsageError(
        f"{tokens} tokens need about {needed / 1e9:.1f} GB for scores and logits, and {available / 1e9:.1f} GB are "
        "available",
        f"at most {fitting} tokens",
        "take fewer, or leave the parallel form out" if parallel else "take fewer, or smaller chunks",
    )


def estimated_memory(config: RetNetConfig, rows: int, tokens: int, forms: Mapping[str, RetentionForm]) -> int:
    """Bytes of a float64 run of all forms on `rows` x `tokens`, parameters aside.

    Scores, [rows, H, L, L] three times over (before and after decay, and their absolute values), L being all tokens
    for the parallel form and a chunk's for the chunkwise one; and the logits and hidden states that are kept of each
    form.
    """
    length = max(_score_length(form, tokens) for form in forms.values())
    scores = 3 * rows * config.num_heads * length**2
    width = config.vocab_size + (config.num_layers + 1) * config.hidden_size
    return _FLOAT64 * (scores + len(forms) * rows * tokens * width)


def _score_length(form: RetentionForm, tokens: int) -> int:
    if isinstance(form, partial):
        return min(tokens, int(form.keywords.get("chunk_size", tokens)))
    return tokens if form is retention_parallel else 0
