"""What looks wrong in the weights: each tensor is read once, one in memory at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from retnet_tools.evaluate.lint import Finding, Severity, counted, listing
from retnet_tools.weights import Array, WeightSource, is_floating

FLOAT16_MAX = 65504.0
EMBEDDING, HEAD = "embedding.weight", "lm_head.weight"
_BLOCK = 1 << 20
"""Elements looked at together: small enough for the cache."""

COUNTED: dict[str, tuple[Severity, str, str]] = {
    "nan": ("error", "NaN", "all that they reach is NaN"),
    "infinite": ("error", "infinite", "an overflow in training or conversion"),
    "float16-saturated": ("warning", "of magnitude 65504, float16's largest,", "clipped on the way to float16"),
    "beyond-float16": ("info", "beyond 65504", "float16 cannot hold them: use fp32 or bf16"),
}
"""By the name of the check: its severity, what the values are that it counts, and what follows from that."""


@dataclass(frozen=True)
class TensorScan:
    """What a tensor holds.

    Attributes:
        size: number of elements.
        counts: how many of them each check of `COUNTED` found; only a float16 tensor is saturated.
        low: the smallest finite value; infinity without any.
        high: the largest finite value; minus infinity without any.
    """

    size: int
    counts: Mapping[str, int]
    low: float
    high: float

    @property
    def constant(self) -> bool:
        """Whether all of several elements are one and the same number."""
        return self.size > 1 and not self.counts["nan"] + self.counts["infinite"] and self.low == self.high


def scan(array: Array) -> TensorScan:
    """Look at a float tensor block by block; memory: a block of a million elements in float32, beside the tensor."""
    flat, half = array.reshape(-1), array.dtype == np.float16
    counts = dict.fromkeys(COUNTED, 0)
    low, high = math.inf, -math.inf
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        values = block if block.dtype == np.float64 else block.astype(np.float32, copy=False)
        finite = values
        if not math.isfinite(values.min()) or not math.isfinite(values.max()):
            counts["nan"] += int(np.isnan(values).sum())
            counts["infinite"] += int(np.isinf(values).sum())
            finite = values[np.isfinite(values)]
            if not finite.size:
                continue
        block_low, block_high = float(finite.min()), float(finite.max())
        low, high = min(low, block_low), max(high, block_high)
        if max(-block_low, block_high) >= FLOAT16_MAX:
            counts["float16-saturated"] += int((np.abs(finite) == FLOAT16_MAX).sum()) if half else 0
            counts["beyond-float16"] += int((np.abs(finite) > FLOAT16_MAX).sum())
    return TensorScan(flat.size, counts, low, high)


def lint_weights(weights: WeightSource, progress: Callable[[int], None]) -> list[Finding]:
    """Findings about the data of all float tensors; others (quantized ones) are passed over.

    Args:
        weights: by canonical name, or by the name that an exported graph gives them.
        progress: called with the bytes of each tensor once it is done.

    Raises:
        InputError: a file that ends early.
    """
    scans: dict[str, TensorScan] = {}
    digests: dict[str, tuple[str, bytes]] = {}
    for name in weights.names():
        info = weights.info(name)
        if is_floating(info.dtype):
            array = weights.read(name)
            scans[name] = scan(array)
            if name in (EMBEDDING, HEAD):
                digests[name] = (info.dtype.name, _digest(array))
            # Not still held while the next one is read.
            del array
        progress(info.nbytes)
    findings = [*_counted(scans), *_constant(scans), *_untrained_norms(scans)]
    if len(digests) == 2 and digests[EMBEDDING] == digests[HEAD]:
        saved = weights.info(HEAD).nbytes
        message = f"{HEAD} equals {EMBEDDING} bit for bit but is not tied: tying them would save {saved / 1e6:.1f} MB"
        findings.append(Finding("untied-duplicate", "info", message, (EMBEDDING, HEAD)))
    return findings


def _counted(scans: Mapping[str, TensorScan]) -> Iterator[Finding]:
    for check, (severity, what, consequence) in COUNTED.items():
        names = tuple(name for name, found in scans.items() if found.counts[check])
        if names:
            values = counted(sum(scans[name].counts[check] for name in names), "value")
            yield Finding(check, severity, f"{values} {what} in {listing(names)}: {consequence}", names)


def _constant(scans: Mapping[str, TensorScan]) -> Iterator[Finding]:
    found = {
        name: s.low
        for name, s in scans.items()
        if name.endswith(".weight") and s.constant and not (_is_norm(name) and s.low == 1)
    }
    if found:
        same = f"all {next(iter(found.values())):g}" if len(set(found.values())) == 1 else "one number each"
        message = f"{counted(len(found), 'constant tensor')} ({same}): {listing(list(found))}"
        yield Finding("constant", "warning", message, tuple(found))


def _untrained_norms(scans: Mapping[str, TensorScan]) -> Iterator[Finding]:
    norms = [name for name in scans if _is_norm(name) and name.endswith(".weight")]
    ones = tuple(name for name in norms if scans[name].constant and scans[name].low == 1)
    if not ones:
        return
    if len(ones) == len(norms):
        yield Finding("norms-are-one", "warning", f"all {len(norms)} norm weights are exactly 1: untrained?", ones)
    else:
        message = f"{len(ones)} of {len(norms)} norm weights are exactly 1, as never trained: {listing(ones)}"
        yield Finding("norms-are-one", "info", message, ones)


def _is_norm(name: str) -> bool:
    return name.rpartition(".")[0].endswith("norm")


def _digest(array: Array) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).digest()
