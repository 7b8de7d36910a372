"""What `retnet-tools state` reports about saved sequences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retnet_tools.console import print_line, result_console, result_table
from retnet_tools.errors import VerificationError
from retnet_tools.runtime.state_file import StateFile
from retnet_tools.weights import Array

SCHEMA_VERSION = 1


def state_document(path: Path, state: StateFile) -> dict[str, Any]:
    """What a state file holds; norms are Frobenius norms of a layer's `[H, K, V]`, for each row."""
    norms = [np.sqrt((layer.astype(np.float64) ** 2).sum((1, 2, 3))) for layer in state.states]
    return {
        "schema_version": SCHEMA_VERSION,
        "path": str(path),
        "bytes": path.stat().st_size,
        "layers": len(state.states),
        "state_shape": list(state.states[0].shape[1:]),
        "fingerprint": state.fingerprint,
        "sampling": vars(state.sampling),
        "rows": [
            {
                "position": int(state.position[row]),
                "tokens_sha256": state.token_hashes[row],
                "distinct_tokens": int(state.seen[row].sum()),
                "state_norms": [float(norm[row]) for norm in norms],
            }
            for row in range(state.batch)
        ],
    }


def render_state(document: dict[str, Any]) -> None:
    """The same for people."""
    console, fingerprint = result_console(), document["fingerprint"]
    shape = " x ".join(map(str, document["state_shape"]))
    print_line(
        console,
        f"{document['path']}: {document['bytes'] / 1e6:.2f} MB, {document['layers']} layers of {shape}, "
        f"{fingerprint.get('state_dtype')}",
    )
    print_line(
        console,
        f"model {str(fingerprint.get('model'))[:12]}, {fingerprint.get('dtype')}, "
        f"quantization {fingerprint.get('quantization')}",
    )
    table = result_table("row", "tokens", "distinct", "tokens sha256", "state norm")
    for number, row in enumerate(document["rows"]):
        norms = row["state_norms"]
        table.add_row(
            str(number),
            f"{row['position']:,}",
            f"{row['distinct_tokens']:,}",
            row["tokens_sha256"][:12],
            f"{min(norms):.4g} to {max(norms):.4g}",
        )
    console.print(table)


def difference_document(a: StateFile, b: StateFile) -> dict[str, Any]:
    """How far two states are apart, layer by layer; `max_rel` is relative to the largest element of the first, and at
    the top it is the largest of all layers and the logits."""
    comparable = len(a.states) == len(b.states) and all(
        x.shape == y.shape for x, y in zip((*a.states, a.logits), (*b.states, b.logits), strict=True)
    )
    layers = [_difference(x, y) for x, y in zip(a.states, b.states, strict=True)] if comparable else []
    logits = _difference(a.logits, b.logits) if comparable else None
    return {
        "schema_version": SCHEMA_VERSION,
        "same_shapes": comparable,
        "same_tokens": a.token_hashes == b.token_hashes,
        "same_positions": a.position.tolist() == b.position.tolist(),
        "other_fingerprint": [
            name
            for name in sorted({*a.fingerprint, *b.fingerprint})
            if a.fingerprint.get(name) != b.fingerprint.get(name)
        ],
        "layers": layers,
        "logits": logits,
        "same_top_1": float((a.logits.argmax(-1) == b.logits.argmax(-1)).mean()) if comparable else None,
        "max_rel": max(part["max_rel"] for part in (*layers, logits)) if logits else None,
    }


def check_difference(document: dict[str, Any], tolerance: float) -> None:
    """Fail where two states are not the same up to a relative difference.

    Raises:
        VerificationError: other tokens, positions, shapes or model, or a difference above `tolerance`.
    """
    for name in ("tokens", "positions", "shapes"):
        if not document[f"same_{name}"]:
            raise VerificationError(f"the states have different {name}", f"the same {name}")
    if document["other_fingerprint"]:
        raise VerificationError(f"the states differ in {', '.join(document['other_fingerprint'])}", "one model")
    if document["max_rel"] > tolerance:
        raise VerificationError(f"a relative difference of {document['max_rel']:.3e}", f"at most {tolerance:g}")


def render_difference(document: dict[str, Any]) -> None:
    """The same for people."""
    console = result_console()
    for name in ("tokens", "positions", "shapes"):
        print_line(console, f"{name:<10} {'the same' if document[f'same_{name}'] else 'different'}")
    others = ", ".join(document["other_fingerprint"])
    print_line(console, f"{'model':<10} {f'different: {others}' if others else 'the same'}")
    if not document["same_shapes"]:
        return
    table = result_table("", "max abs", "max rel")
    named = [(f"layer {i}", layer) for i, layer in enumerate(document["layers"])]
    for name, row in [*named, ("logits", document["logits"])]:
        table.add_row(name, f"{row['max_abs']:.3e}", f"{row['max_rel']:.3e}")
    console.print(table)
    print_line(console, f"same top 1 {document['same_top_1']:.2%}")


def next_tokens_document(state: StateFile, words: Sequence[Sequence[tuple[int, str, float]]]) -> dict[str, Any]:
    """A loaded state: for each row its position and its likeliest next tokens as `(id, text, probability)`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "rows": [
            {
                "position": int(position),
                "next": [{"token": token, "text": text, "probability": p} for token, text, p in row],
            }
            for position, row in zip(state.position, words, strict=True)
        ],
    }


def render_next_tokens(document: dict[str, Any]) -> None:
    """The same for people."""
    console = result_console()
    for number, row in enumerate(document["rows"]):
        likely = ", ".join(f"{item['text']!r} {item['probability']:.1%}" for item in row["next"])
        print_line(console, f"row {number}: {row['position']:,} tokens; next {likely}")


def likeliest(logits: Array, count: int) -> list[tuple[int, float]]:
    """The `count` likeliest tokens of `[vocab]` logits and their probabilities."""
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    order = np.argsort(-weights, kind="stable")[:count]
    return [(int(token), float(weights[token] / weights.sum())) for token in order]


def _difference(a: Array, b: Array) -> dict[str, float]:
    wide = a.astype(np.float64)
    distance = float(np.abs(wide - b.astype(np.float64)).max())
    largest = float(np.abs(wide).max())
    return {"max_abs": distance, "max_rel": distance / largest if largest else distance}
