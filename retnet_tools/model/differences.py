"""How far two runs of a model are apart: in logits, in the distributions they mean, and layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retnet_tools.model.retnet import RetNetOutput

_LAYER_LEVELS = {torch.float64: 1e-11, torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}


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


def difference(a: RetNetOutput, b: RetNetOutput, distributions: bool = True) -> Difference:
    """Compare two runs that kept their hidden states; a value that is not finite makes `max_abs` not finite.

    `distributions` tells whether the logits mean any.
    """
    largest = max_abs(a.logits)
    apart = max_abs_difference(a.logits, b.logits)
    layers, first = [], None
    for i, (x, y) in enumerate(zip(a.hidden_states[1:], b.hidden_states[1:], strict=True)):
        layers.append(max_abs_difference(x, y))
        if first is None and not layers[-1] <= _LAYER_LEVELS[x.dtype] * max_abs(x):
            first = i
    return Difference(
        max_abs=apart,
        max_rel=apart / largest if largest else apart,
        kl_mean=_kl_mean(a.logits, b.logits) if distributions else None,
        top1_agreement=_top1_agreement(a.logits, b.logits) if distributions else None,
        layers=tuple(layers),
        first_layer=first,
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
