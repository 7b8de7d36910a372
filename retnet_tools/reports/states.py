"""What `retnet-tools state` reports about saved sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retnet_tools.console import ResultTable, print_line, result_console
from retnet_tools.evaluate.saved_states import StateComparison, state_norms
from retnet_tools.runtime.state_file import StateFile

SCHEMA_VERSION = 1


def state_document(path: Path, state: StateFile) -> dict[str, Any]:
    """What a state file holds; norms are Frobenius norms of a layer's `[H, K, V]`, for each row."""
    norms = state_norms(state)
    return {
        "schema_version": SCHEMA_VERSION,
        "path": str(path),
        "bytes": path.stat().st_size,
        "layers": len(state.states),
        "state_shape": list(state.states[0].shape[1:]),
        "fingerprint": state.fingerprint,
        "sampling": state.sampling.settings(),
        "rows": [
            {
                "position": int(state.position[row]),
                "tokens_sha256": state.token_hashes[row],
                "distinct_tokens": int(state.seen[row].sum()),
                "state_norms": norms[row].tolist(),
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
    table = ResultTable("row", "tokens", "distinct", "tokens sha256", "state norm")
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


def difference_document(comparison: StateComparison) -> dict[str, Any]:
    """How far two states are apart as JSON."""
    return {"schema_version": SCHEMA_VERSION, **asdict(comparison)}


def render_difference(document: dict[str, Any]) -> None:
    """The same for people."""
    console = result_console()
    for name in ("tokens", "positions", "shapes"):
        print_line(console, f"{name:<10} {'the same' if document[f'same_{name}'] else 'different'}")
    others = ", ".join(document["other_fingerprint"])
    print_line(console, f"{'model':<10} {f'different: {others}' if others else 'the same'}")
    if not document["same_shapes"]:
        return
    table = ResultTable("", "max abs", "max rel")
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
