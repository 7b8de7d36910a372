"""Words and cells of the tables that `docs_tables.py` makes of records."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
Document = dict[str, Any]
NAMES = {"retnet": "RetNet", "torch": "torch, recurrent form"}
ALTERNATIVES = {"transformer": "Transformer", "transformer-gqa": "Transformer, a quarter of the KV heads"}


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def origin(*documents: Document) -> str:
    """What each was measured on, the commands, and what is to be said against the figures."""
    places: dict[str, list[Document]] = {}
    for document in documents:
        places.setdefault(place(document), []).append(document)
    parts = []
    for text, here in places.items():
        days = sorted({document["recorded"] for document in here})
        commands = "\n".join(document["command"] for document in here)
        parts.append(f"{text}; {' and '.join(days)}:\n\n```\n{commands}\n```")
    noisy = [line for document in documents for line in document.get("noisy", ())]
    if noisy:
        parts.append(f"Deviating by more than 5% of the mean: {'; '.join(noisy)}.")
    if again := [line for document in documents for line in document.get("made_again", ())]:
        parts.append(f"Repetitions made again, being off by more than 10%: {'; '.join(again)}.")
    if any(document.get("modified") for document in documents):
        parts.append("Measured with changes that are not in the recorded commit.")
    return "\n\n".join(parts)


def place(document: Document) -> str:
    """The machine and device of a record."""
    machine = document["machine"]
    memory = "" if machine["memory_bytes"] is None else f", {machine['memory_bytes'] / 2**30:.0f} GiB"
    device = f"{document['device_name']}; " if document.get("device_name") else ""
    return f"{device}{machine['processor']}, {machine['cores']} cores{memory}"


def title(row: Row) -> str:
    name = row["implementation"]
    return (NAMES | ALTERNATIVES)[name]


def weights(row: Row) -> str:
    """Types of weights and, where they differ, of activations."""
    return f"{row['quantization']}, {row['dtype']} activations" if row["quantization"] else row["dtype"]


def spread(row: Row) -> str:
    deviation = row["tokens_per_second_std"]
    return f"{number(row['tokens_per_second'])}" + ("" if deviation is None else f" ± {number(deviation)}")


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def gigabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e9:.2f}"


def memory(row: Row) -> float | None:
    return row["peak_resident_bytes"] if row["device_bytes"] is None else row["device_bytes"]


def threads(row: Row) -> str:
    return str(row["threads"] or "all")


def sequence(row: Row) -> float:
    """Bytes of the states or of the cache of a sequence, in all their buffers."""
    return float(row["state_bytes_per_sequence"] * row["state_buffers"])


def skipped(document: Document) -> str:
    """What was not measured and why; those that differ in numbers only are told by the first of them."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for skip in document["skipped"]:
        groups.setdefault((skip["implementation"], re.sub(r"[\d.]+", "", skip["reason"])), []).append(skip)
    notes = []
    for (name, _), (first, *others) in groups.items():
        note = f"{(NAMES | ALTERNATIVES)[name]}, {case(first)}: {first['reason']}"
        notes.append(note + (f" (likewise {'; '.join(map(case, others))})" if others else ""))
    return f"Not measured (`-`): {'. '.join(notes)}." if notes else ""


def case(skip: dict[str, Any]) -> str:
    """A test with its depth and batch."""
    after = f" after {skip['repetitions']} repetitions" if skip["repetitions"] else ""
    return f"{skip['test']}, batch {skip['batch']}{after}"


def milliseconds(entry: dict[str, Any]) -> str:
    deviation = entry["ms_per_token_std"]
    return number(entry["ms_per_token"]) + ("" if deviation is None else f" ± {number(deviation)}")
