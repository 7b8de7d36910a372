"""Mixed precision: a plan whose weights keep to a budget, the types of its matrices chosen by measured sensitivity.

The choice is written as rules of the scheme, so that retnet.json and the model card show it, and the same rules given
by hand make the same model. Sensitivities are those of round to nearest, whatever method makes the codes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from retnet_tools.errors import UsageError
from retnet_tools.graph.export import ExportPlan
from retnet_tools.graph.nodes import ELEMENT_TYPES
from retnet_tools.graph.quantization import (
    BITS,
    BlockFormat,
    MatrixSensitivity,
    MixedPrecision,
    Scheme,
    TensorRule,
    WeightType,
)
from retnet_tools.progress import Progress
from retnet_tools.quantize.budget import Budget, Choice, fill_budget, matrix_bytes
from retnet_tools.quantize.calibration import CalibrationText
from retnet_tools.quantize.methods import MethodTask
from retnet_tools.quantize.plan import plan_quantization
from retnet_tools.quantize.scheme import matrix_formats
from retnet_tools.quantize.sensitivity import Sensitivity, Trial
from retnet_tools.quantize.unfinished import Workplace
from retnet_tools.weights import canonical_shapes

_MERGED = {"q_proj": "qkvg", "k_proj": "qkvg", "v_proj": "qkvg", "up_proj": "gate_up"}
Group = tuple[str, ...]


def plan_mixed(
    plan: ExportPlan,
    scheme: Scheme,
    budget: Budget,
    text: CalibrationText,
    *,
    work: Workplace,
    progress: Progress,
    together: bool = False,
) -> ExportPlan:
    """A quantized plan within a budget.

    The scheme's own type is the smallest that is offered; int8 and float are the others. Matrices that an exclusion
    or a rule of the scheme names keep what that says, and count for nothing in the divergences that are noted.

    Args:
        plan: of float weights.
        text: to measure sensitivities on, and for a calibrated method.
        work: the place for results that are worth keeping if the run is stopped.
        together: matrices that a graph keeps as one get one type: faster to measure and to run, less free to choose.

    Raises:
        UsageError: a budget that is too small, with what can be had, or one that float weights fit; nothing to choose.
        InputError: weights or logits that are not finite.
    """
    sizes = _Sizes(plan, scheme)
    groups = _groups(sizes.free, together)
    smallest = plan_quantization(plan, scheme, text)
    room = _room(budget, sizes, smallest, scheme.type)
    kinds: tuple[WeightType, ...] = ("int8",) if scheme.type == "int8" else ("int4", "int8")
    trials = {(group, kind): Trial(group, sizes.block_format(kind)) for group in groups for kind in kinds}
    dtype = ELEMENT_TYPES[plan.dtype].numpy()
    task = MethodTask(plan.checkpoint.config, plan.checkpoint.weights, {}, dtype, text, work, progress)
    sensitivity = Sensitivity(task, list(trials.values()))
    found = sensitivity.measure()
    choices = [
        [
            *(Choice(kind, sizes.of(group, kind), found[trials[group, kind]]) for kind in kinds),
            Choice(None, sizes.of(group, None), 0.0),
        ]
        for group in groups
    ]
    while True:
        chosen = dict(zip(groups, fill_budget(choices, room), strict=True))
        mixed = plan_quantization(plan, _with_rules(scheme, chosen), text)
        # Matrices that a graph no longer keeps as one are aligned one by one, which takes some room of its own.
        if budget.size is None or mixed.weight_bytes <= budget.size:
            break
        room -= mixed.weight_bytes - budget.size
    formats = {n: sizes.block_format(c.type) for group, c in chosen.items() if c.type is not None for n in group}
    predicted, measured = sum(choice.divergence for choice in chosen.values()), sensitivity.total(formats)
    note = (
        f"types chosen by sensitivity: mean KL divergence {predicted:.2e} predicted, {measured:.2e} measured (rounded "
        f"to nearest, {sensitivity.text.tokens} tokens of {text.record.text})"
    )
    table = tuple(MatrixSensitivity(group, kind, found[trial]) for (group, kind), trial in trials.items())
    record = MixedPrecision(budget.size, budget.bits, sensitivity.text, predicted, measured, table)
    assert mixed.quantization is not None
    quantization = dataclasses.replace(mixed.quantization, mixed_precision=record)
    return dataclasses.replace(mixed, quantization=quantization, notes=(*mixed.notes, note))


class _Sizes:
    """Bytes of matrices, of those that are free to choose and of the others."""

    def __init__(self, plan: ExportPlan, scheme: Scheme) -> None:
        self._scheme, self._shapes = scheme, canonical_shapes(plan.checkpoint.config)
        self._float_size = ELEMENT_TYPES[plan.dtype].numpy().itemsize
        self._formats = matrix_formats(scheme, plan.checkpoint.config)
        ruled = (*scheme.exclude, *(rule.pattern for rule in scheme.tensor_types))
        self.free = [name for name in self._formats if not any(re.search(pattern, name) for pattern in ruled)]
        if not self.free:
            raise UsageError("rules that name every matrix, and a budget", "matrices whose type is free to choose")

    @property
    def weights(self) -> int:
        """Weights in all matrices."""
        return sum(int(np.prod(self._shapes[name])) for name in self._formats)

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the matrices that are not free."""
        fixed = set(self._formats) - set(self.free)
        return sum(matrix_bytes(self._shapes[name], self._formats[name], self._float_size) for name in fixed)

    def of(self, names: Sequence[str], kind: WeightType | None) -> int:
        """Bytes of some matrices in a type; None is float."""
        format = None if kind is None else self.block_format(kind)
        return sum(matrix_bytes(self._shapes[name], format, self._float_size) for name in names)

    def block_format(self, kind: WeightType) -> BlockFormat:
        return BlockFormat(BITS[kind], self._scheme.block_size, self._scheme.symmetric)


def _groups(names: Sequence[str], together: bool) -> list[Group]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_merged(name) if together else name].append(name)
    return list(map(tuple, groups.values()))


def _merged(name: str) -> str:
    """One name for all matrices that a graph keeps as one."""
    place, _, linear = name.removesuffix(".weight").rpartition(".")
    if linear == "gate_proj":
        return f"{place}.{'gate_up' if place.endswith('ffn') else 'qkvg'}"
    return f"{place}.{_MERGED.get(linear, linear)}"


def _room(budget: Budget, sizes: _Sizes, smallest: ExportPlan, kind: WeightType) -> int:
    """Bytes for the matrices that are free to choose."""
    least, most = sizes.of(sizes.free, kind), sizes.of(sizes.free, None)
    if budget.size is not None:
        others = smallest.weight_bytes - least
        room, option = budget.size - others, f"--target-size {budget.size / 1e6:.2f}MB"
        needed, floats = (f"{math.ceil((others + size) / 1e4) / 100:.2f}MB" for size in (least, most))
    else:
        assert budget.bits is not None
        others = sizes.fixed_bytes
        room, option = int(budget.bits * sizes.weights / 8) - others, f"--target-bits {budget.bits:g}"
        needed, floats = (f"{math.ceil(8e3 * (others + size) / sizes.weights) / 1e3:g}" for size in (least, most))
    if room < least:
        raise UsageError(
            f"{option} cannot be met",
            f"at least {needed}, which is {kind} wherever the type is free",
            f"{'--quantize int4, ' if kind == 'int8' else ''}larger blocks or fewer exclusions take less",
        )
    if room >= most:
        raise UsageError(f"{option} is enough for float weights ({floats})", "less, or no target")
    return room


def _with_rules(scheme: Scheme, chosen: Mapping[Group, Choice]) -> Scheme:
    """A scheme with a rule for each matrix whose type is not the scheme's own."""
    by_type: dict[WeightType | None, list[str]] = defaultdict(list)
    for group, choice in chosen.items():
        if choice.type != scheme.type:
            by_type[choice.type] += group
    return dataclasses.replace(
        scheme,
        exclude=(*scheme.exclude, *_patterns(by_type.pop(None, []))),
        tensor_types=(
            *scheme.tensor_types,
            *(TensorRule(pattern, kind) for kind, names in by_type.items() if kind for pattern in _patterns(names)),
        ),
    )


def _patterns(names: Sequence[str]) -> list[str]:
    """Patterns that fit these names and no others: one for each kind of matrix, with the layers that it stands in."""
    layers: dict[str, list[str]] = defaultdict(list)
    patterns = []
    for name in names:
        if match := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
            layers[match[2]].append(match[1])
        else:
            patterns.append(f"^{re.escape(name)}$")
    for rest, numbers in layers.items():
        alternatives = numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
        patterns.append(rf"^layers\.{alternatives}\.{re.escape(rest)}$")
    return patterns
