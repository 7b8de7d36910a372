"""Mixed precision: a plan whose weights keep to a size, the types of its matrices chosen by measured sensitivity.

Divergences are taken to add up, so the sum over matrices of their own is what is to be small. From the smallest types
on, whichever step to a larger type saves most divergence a byte and still fits is taken, until none fits.

The choice is written as rules of the scheme, so that retnet.json and the model card show it, and the same rules given
by hand make the same model. Sensitivities are those of round to nearest, whatever method makes the codes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from retnet_tools.errors import UsageError
from retnet_tools.graph.code_types import CODE_TYPES, BlockFormat, matrix_bytes
from retnet_tools.graph.export import ExportPlan
from retnet_tools.graph.nodes import ELEMENT_TYPES
from retnet_tools.graph.quantization import MatrixSensitivity, MixedPrecision, Scheme, TensorRule
from retnet_tools.progress import Progress
from retnet_tools.quantize.calibration import CalibrationText
from retnet_tools.quantize.methods import MethodTask
from retnet_tools.quantize.plan import QuantizedPlan, plan_blocks
from retnet_tools.quantize.sensitivity import Sensitivity, Trial
from retnet_tools.quantize.unfinished import Workplace
from retnet_tools.weights import canonical_shapes

Group = tuple[str, ...]


def plan_mixed(
    plan: ExportPlan,
    scheme: Scheme,
    text: CalibrationText,
    *,
    work: Workplace,
    progress: Progress,
    target_size: int | None = None,
    target_bits: float | None = None,
    together: bool = False,
) -> QuantizedPlan:
    """A quantized plan that keeps to one of two targets.

    The scheme's own type is the smallest that is offered; those of more bits and float are the others. Matrices that
    an exclusion or a rule of the scheme names keep what that says, and count for nothing in the divergences that are
    noted.

    Args:
        plan: of float weights.
        text: to measure sensitivities on, and for a calibrated method.
        work: the place for results that are worth keeping if the run is stopped.
        target_size: bytes of weights.data.
        target_bits: bits a weight on average over all matrices, scales and zero points included.
        together: matrices that a graph keeps as one get one type: faster to measure and to run, less free to choose.

    Raises:
        UsageError: a target that is too small, with what can be had, or one that float weights fit; nothing to choose.
        InputError: weights or logits that are not finite.
    """
    smallest = plan_blocks(plan, scheme, text)
    sizes = _Sizes(smallest, scheme)
    merged: dict[str, list[str]] = defaultdict(list)
    owners = {source: tensor.name for tensor in plan.tensors.values() for source in tensor.sources}
    for name in sizes.free:
        merged[owners[name] if together else name].append(name)
    groups: list[Group] = list(map(tuple, merged.values()))
    room = sizes.room(smallest, target_size, target_bits)
    rows = sorted(CODE_TYPES.values(), key=lambda row: row.bits)
    kinds = [row.name for row in rows if row.bits >= CODE_TYPES[scheme.type].bits]
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
        chosen = dict(zip(groups, fill_room(choices, room), strict=True))
        mixed = plan_blocks(plan, _with_rules(scheme, chosen), text)
        # Matrices that a graph no longer keeps as one are aligned one by one, which takes some room of its own.
        if target_size is None or mixed.weight_bytes <= target_size:
            break
        room -= mixed.weight_bytes - target_size
    formats = {n: sizes.block_format(c.type) for group, c in chosen.items() if c.type is not None for n in group}
    predicted, measured = sum(choice.divergence for choice in chosen.values()), sensitivity.total(formats)
    note = (
        f"types chosen by sensitivity: mean KL divergence {predicted:.2e} predicted, {measured:.2e} measured (rounded "
        f"to nearest, {sensitivity.text.tokens} tokens of {text.record.text})"
    )
    table = tuple(MatrixSensitivity(group, kind, found[trial]) for (group, kind), trial in trials.items())
    record = MixedPrecision(target_size, target_bits, sensitivity.text, predicted, measured, table)
    assert mixed.quantization is not None
    quantization = dataclasses.replace(mixed.quantization, mixed_precision=record)
    return dataclasses.replace(mixed, quantization=quantization, notes=(*mixed.notes, note))


@dataclass(frozen=True)
class Choice:
    """A type that some matrices may have together, None for float; their bytes; what it costs, nats a token."""

    type: str | None
    size: int
    divergence: float

    def __post_init__(self) -> None:
        # NaN is neither more nor less than another: what is chosen would be an accident.
        if not math.isfinite(self.divergence):
            raise ValueError(f"a divergence of {self.divergence}")


def fill_room(choices: Sequence[Sequence[Choice]], size: int) -> list[Choice]:
    """One choice for each of several groups of matrices, of `size` bytes together at most.

    Args:
        choices: of each group, the smallest first, which have to fit.
    """
    chosen = [options[0] for options in choices]
    left = size - sum(choice.size for choice in chosen)
    while True:
        steps = [
            ((now.divergence - option.divergence) / (option.size - now.size), i, option)
            for i, (now, options) in enumerate(zip(chosen, choices, strict=True))
            for option in options
            if 0 < option.size - now.size <= left and option.divergence < now.divergence
        ]
        if not steps:
            return chosen
        _, i, option = max(steps, key=lambda step: step[:2])
        left -= option.size - chosen[i].size
        chosen[i] = option


class _Sizes:
    """Bytes of matrices, of those that are free to choose and of the others."""

    def __init__(self, smallest: QuantizedPlan, scheme: Scheme) -> None:
        self._scheme, self._formats = scheme, smallest.formats
        self._shapes = canonical_shapes(smallest.checkpoint.config)
        self._float_size = ELEMENT_TYPES[smallest.dtype].numpy().itemsize
        self.free = [name for name in self._formats if not any(re.search(p, name) for p in scheme.patterns)]
        if not self.free:
            raise UsageError("rules that name every matrix, and a budget", "matrices whose type is free to choose")

    def of(self, names: Sequence[str], kind: str | None) -> int:
        """Bytes of some matrices in a type; None is float."""
        format = None if kind is None else self.block_format(kind)
        return sum(self._matrix(name, format) for name in names)

    def block_format(self, kind: str) -> BlockFormat:
        return BlockFormat(CODE_TYPES[kind].bits, self._scheme.block_size, self._scheme.symmetric)

    def room(self, smallest: QuantizedPlan, size: int | None, bits: float | None) -> int:
        """Bytes for the matrices that are free to choose."""
        kind = self._scheme.type
        least, most = self.of(self.free, kind), self.of(self.free, None)
        if size is not None:
            others = smallest.weight_bytes - least
            room, option = size - others, f"--target-size {size / 1e6:.2f}MB"
            needed, floats = (f"{math.ceil((others + free) / 1e4) / 100:.2f}MB" for free in (least, most))
        else:
            assert bits is not None
            weights = sum(math.prod(self._shapes[name]) for name in self._formats)
            others = sum(self._matrix(name, format) for name, format in self._formats.items() if name not in self.free)
            room, option = int(bits * weights / 8) - others, f"--target-bits {bits:g}"
            needed, floats = (f"{math.ceil(8e3 * (others + free) / weights) / 1e3:g}" for free in (least, most))
        if room < least:
            fewest = min(CODE_TYPES.values(), key=lambda row: row.bits).name
            raise UsageError(
                f"{option} cannot be met",
                f"at least {needed}, which is {kind} wherever the type is free",
                f"{'' if kind == fewest else f'--quantize {fewest}, '}larger blocks or fewer exclusions take less",
            )
        if room >= most:
            raise UsageError(f"{option} is enough for float weights ({floats})", "less, or no target")
        return room

    def _matrix(self, name: str, format: BlockFormat | None) -> int:
        return matrix_bytes(self._shapes[name], format, self._float_size)


def _with_rules(scheme: Scheme, chosen: Mapping[Group, Choice]) -> Scheme:
    """A scheme with a rule for each matrix whose type is not the scheme's own."""
    by_type: dict[str | None, list[str]] = defaultdict(list)
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
