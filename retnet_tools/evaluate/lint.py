"""What a model's configuration tells before it is run: how long each head remembers, and what looks wrong in it, its
gammas and its tokenizer.

Findings about the weights themselves, which need their data, are in `weight_lint`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import InputError
from retnet_tools.tokenizing.files import TOKENIZER_FILE, load_tokenizer

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")

LARGE_HEAD_NORM_EPS = 1e-4
"""Above this, the forms of a model with a score clamp differ visibly (0.1 in logits at 1e-3)."""
PADDING = 128
"""Rows that an embedding may have beyond its tokenizer's tokens, as padding."""
_SHOWN = 3

_FLOAT_TYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
_ROUNDED_HERE = {
    "bfloat16": "decay stays in float32 here, but code that casts it never forgets there",
    "float16": "decay stays in float32 here, but code that casts it never forgets there",
    "float32": "in float32 arithmetic nothing is forgotten there",
}


@dataclass(frozen=True)
class HeadMemory:
    """What gamma, the factor on the state at every token (Eq. 6), makes a head remember.

    Attributes:
        head: its label.
        log_gamma: in float64.
    """

    head: str
    log_gamma: float

    @property
    def gamma(self) -> float:
        """exp(log gamma)."""
        return math.exp(self.log_gamma)

    @property
    def half_life(self) -> float:
        """Tokens after which half of a contribution to the state is left: ln(1/2) / ln(gamma)."""
        return self._tokens_until(0.5)

    @property
    def horizon(self) -> float:
        """Tokens after which a hundredth is left: ln(0.01) / ln(gamma)."""
        return self._tokens_until(0.01)

    def _tokens_until(self, share: float) -> float:
        return math.inf if self.log_gamma == 0 else math.log(share) / self.log_gamma


def head_memories(config: RetNetConfig) -> tuple[HeadMemory, ...]:
    """The memory of each head, the same in all layers; of its slowest and fastest pair where pairs differ."""
    memories = []
    for head, log_gamma in enumerate(config.decay):
        if config.key_decay:
            pairs = config.of_head(config.key_decay, head)
            memories.append(HeadMemory(f"{head}, slowest pair", log_gamma + max(pairs)))
            memories.append(HeadMemory(f"{head}, fastest pair", log_gamma + min(pairs)))
        else:
            memories.append(HeadMemory(str(head), log_gamma))
    return tuple(memories)


def gamma_text(log_gamma: float) -> str:
    """gamma with five digits of 1 - gamma, so that 1 - 2^(-36) does not read 1."""
    rest = -math.expm1(log_gamma)
    if not 0 < rest < 0.5:
        return f"{math.exp(log_gamma):.6g}"
    return f"{math.exp(log_gamma):.{4 - math.floor(math.log10(rest))}f}"


@dataclass(frozen=True)
class Finding:
    """Something that looks wrong.

    Attributes:
        check: the name of the check that found it.
        severity: `error` gives wrong results or none, `warning` is probably a mistake, `info` is worth knowing.
        where: names of all tensors, or labels of all heads, that it is about.
    """

    check: str
    severity: Severity
    message: str
    where: tuple[str, ...] = ()


def lint_config(config: RetNetConfig, stored_types: Iterable[str]) -> Iterator[Finding]:
    """Findings about the configuration.

    Args:
        config: the model.
        stored_types: the dtypes of its tensors, by name.
    """
    yield from _gamma(config, sorted(set(stored_types)))
    rotations = {config.of_head(config.rotary_frequencies, head) for head in range(config.num_heads)}
    if not all(map(_decreases, rotations)):
        yield Finding("rotary-order", "warning", "rotary frequencies do not decrease from pair to pair")
    clamp, norm = config.score_normalization.clamp, config.head_norm
    if clamp == "none":
        return
    if norm.kind == "none":
        message = f"scores are clamped ({clamp}) but no head norm cancels that: only the parallel form does it"
        yield Finding("score-clamp", "warning", message)
    elif norm.eps > LARGE_HEAD_NORM_EPS:
        message = f"head-norm eps {norm.eps:g} with scores clamped ({clamp}): the parallel form differs, run verify"
        yield Finding("score-clamp", "warning", message)


def lint_tokenizer(vocab_size: int, files: Iterable[Path]) -> Iterator[Finding]:
    """Findings about the tokenizer's files: missing ones, ids past the embedding, an embedding far too large."""
    files = list(files)
    missing = [file for file in files if not file.is_file()]
    if missing:
        message = f"no {', '.join(file.name for file in missing)} in {missing[0].parent}"
        yield Finding("tokenizer-missing", "warning", message)
    file = next((f for f in files if f.name == TOKENIZER_FILE and f not in missing), None)
    if file is None or vocab_size == 0:
        return
    try:
        tokens = 1 + max(load_tokenizer(file).get_vocab().values(), default=-1)
    except InputError as error:
        yield Finding("tokenizer-unreadable", "warning", str(error))
        return
    if tokens > vocab_size:
        message = f"{TOKENIZER_FILE} has ids up to {tokens - 1}, the embedding only {vocab_size} rows"
        yield Finding("vocabulary", "warning", message)
    elif vocab_size - tokens > max(PADDING, vocab_size // 10):
        message = f"the embedding has {vocab_size} rows, {TOKENIZER_FILE} only {tokens} tokens: is it this model's?"
        yield Finding("vocabulary", "warning", message)


def listing(names: Sequence[str]) -> str:
    """The first names of a list and how many follow."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def counted(count: int, noun: str) -> str:
    """`1 warning`, `2 warnings`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _decreases(frequencies: tuple[float, ...]) -> bool:
    """Whether frequencies decrease from pair to pair, up to pairs at the end that do not turn (partial rotation)."""
    turning = max((i for i, theta in enumerate(frequencies, 1) if theta != 0), default=len(frequencies))
    return all(a > b for a, b in pairwise(frequencies[:turning]))


def _gamma(config: RetNetConfig, stored_types: Sequence[str]) -> Iterator[Finding]:
    heads = head_memories(config)
    endless = tuple(h.head for h in heads if h.log_gamma == 0)
    if endless:
        message = f"gamma is exactly 1 in {_heads(endless)} of {len(heads)}: nothing is ever forgotten"
        yield Finding("gamma-one", "warning", message, endless)
    elif len(heads) > 1 and len({h.log_gamma for h in heads}) == 1:
        yield Finding("gamma-equal", "warning", f"all {len(heads)} heads have the same gamma, {heads[0].gamma:.6g}")
    for name in stored_types:
        if name not in _FLOAT_TYPES:
            continue
        rounded = tuple(h.head for h in heads if h.log_gamma != 0 and _FLOAT_TYPES[name](h.gamma) == 1)
        if rounded:
            message = f"gamma rounds to 1 in {name}, the stored type, in {_heads(rounded)}: {_ROUNDED_HERE[name]}"
            yield Finding("gamma-rounds", "info", message, rounded)


def _heads(labels: Sequence[str]) -> str:
    return f"head{'' if len(labels) == 1 else 's'} {', '.join(labels)}"
