"""One model on the same tokens in several forms, and what the pairs differ by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from retnet_tools.errors import InputError
from retnet_tools.model.differences import Difference, difference, max_abs
from retnet_tools.model.retention import RetentionForm
from retnet_tools.model.retnet import RetNet
from retnet_tools.progress import Progress

Pair = tuple[str, str]


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

    pairs: dict[Pair, Difference]
    first_row: dict[str, Tensor]
    scale: float
    overflowed: tuple[str, ...]
    label: str

    @property
    def notes(self) -> list[str]:
        """Which forms give logits that are not finite."""
        return [f"the {name} form gives logits that are not finite in {self.label}" for name in self.overflowed]


class Steps:
    """Counts the runs for a progress callback."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, what: str) -> None:
        """Report the run that begins now."""
        if self.progress is not None:
            self.progress(what, self.done, self.total)
        self.done += 1


@torch.inference_mode()
def run_forms(model: RetNet, ids: Tensor, forms: Mapping[str, RetentionForm], step: Steps, label: str) -> Run:
    """Run a model on token ids `[B, T]` in every form and compare the pairs."""
    outputs = {}
    for name, form in forms.items():
        step(f"{name}, {label}")
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


def without_epsilon(model: RetNet) -> RetNet:
    """The same parameters, shared, under a head-norm epsilon of zero."""
    with torch.device("meta"):
        exact = RetNet(model.config.with_head_norm_eps(0.0))
    exact.load_state_dict(model.state_dict(), assign=True)
    return exact.eval()
