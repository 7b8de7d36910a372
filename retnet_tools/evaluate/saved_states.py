"""Numbers about saved sequences: the sizes of their states, how far two are apart, what comes next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retnet_tools.errors import VerificationError
from retnet_tools.runtime.state_file import StateFile
from retnet_tools.weights import Array


@dataclass(frozen=True)
class Distance:
    """How far an array is from another: the largest difference, and that by the largest element of the first."""

    max_abs: float
    max_rel: float

    @classmethod
    def of(cls, a: Array, b: Array) -> Distance:
        """The distance of two arrays of one shape."""
        wide = a.astype(np.float64)
        distance, largest = float(np.abs(wide - b.astype(np.float64)).max()), float(np.abs(wide).max())
        return cls(distance, distance / largest if largest else distance)


@dataclass(frozen=True)
class StateComparison:
    """How far two states are apart, layer by layer; where their shapes differ there are no distances.

    Attributes:
        other_fingerprint: what differs of the models that they belong to.
        same_top_1: the share of rows with one likeliest next token.
        max_rel: the largest of all layers and the logits.
    """

    same_shapes: bool
    same_tokens: bool
    same_positions: bool
    other_fingerprint: tuple[str, ...]
    layers: tuple[Distance, ...]
    logits: Distance | None
    same_top_1: float | None
    max_rel: float | None

    def require(self, tolerance: float) -> None:
        """Do nothing for states that are the same up to a relative difference.

        Raises:
            VerificationError: other tokens, positions, shapes or model, or a difference above `tolerance`.
        """
        for name in ("tokens", "positions", "shapes"):
            if not getattr(self, f"same_{name}"):
                raise VerificationError(f"the states have different {name}", f"the same {name}")
        if self.other_fingerprint:
            raise VerificationError(f"the states differ in {', '.join(self.other_fingerprint)}", "one model")
        if self.max_rel is not None and self.max_rel > tolerance:
            raise VerificationError(f"a relative difference of {self.max_rel:.3e}", f"at most {tolerance:g}")


def compare_states(a: StateFile, b: StateFile) -> StateComparison:
    """Compare two saved states."""
    comparable = len(a.states) == len(b.states) and all(
        x.shape == y.shape for x, y in zip((*a.states, a.logits), (*b.states, b.logits), strict=True)
    )
    layers = tuple(map(Distance.of, a.states, b.states)) if comparable else ()
    logits = Distance.of(a.logits, b.logits) if comparable else None
    names = sorted({*a.fingerprint, *b.fingerprint})
    return StateComparison(
        same_shapes=comparable,
        same_tokens=a.token_hashes == b.token_hashes,
        same_positions=a.position.tolist() == b.position.tolist(),
        other_fingerprint=tuple(name for name in names if a.fingerprint.get(name) != b.fingerprint.get(name)),
        layers=layers,
        logits=logits,
        same_top_1=float((a.logits.argmax(-1) == b.logits.argmax(-1)).mean()) if comparable else None,
        max_rel=max(part.max_rel for part in (*layers, logits)) if logits else None,
    )


def state_norms(state: StateFile) -> Array:
    """Frobenius norms of each row's `[H, K, V]` in each layer, `[B, layers]`."""
    return np.stack([np.sqrt((layer.astype(np.float64) ** 2).sum((1, 2, 3))) for layer in state.states], axis=1)


def likeliest(logits: Array, count: int) -> list[tuple[int, float]]:
    """The `count` likeliest tokens of `[vocab]` logits and their probabilities."""
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    order = np.argsort(-weights, kind="stable")[:count]
    return [(int(token), float(weights[token] / weights.sum())) for token in order]
