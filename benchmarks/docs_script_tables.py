"""The tables of docs/benchmarks.md of other records than those of `record.py`; `docs_tables.py` puts them there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from docs_cells import Document, gigabytes, milliseconds, number, origin, table

MEMORY = ("peak_resident_bytes", "private_bytes")


def official(document: Document) -> str:
    """Against torchscale itself: a record of torchscale_step.py."""
    lines = [
        [entry["implementation"], milliseconds(entry), f"{entry['times_official']:.2f}"]
        for entry in document["results"]
    ]
    about = f"{document['size']}, {document['threads']} threads, torch {document['libraries']['torch']}."
    if document.get("deviating"):
        about += " Some repetitions still deviate by more than 10%."
    return f"{table(['', 'ms a token', 'times as fast'], lines)}\n\n{about} {origin(document)}"


def llama_cpp(document: Document) -> str:
    """Beside llama.cpp: a record of llama_cpp.py."""
    lines, opening = [], []
    for found in document["results"]:
        sides = ours, theirs = found["retnet"], found["llama.cpp"]
        lines.append(
            [
                f"{ours['weights']} / {theirs['weights']}",
                found["test"] + (" (again)" if found["made_again"] else ""),
                *(number(side["tokens_per_second"]) for side in sides),
                f"{found['times_as_fast']:.2f} times",
                *(" / ".join(gigabytes(side[name]) for side in sides) for name in MEMORY),
            ]
        )
        if found["depth"] == 0:
            seconds = " / ".join(f"{side['opening_seconds']:.2f}" for side in sides)
            opening.append(f"{seconds} s for {ours['weights']} / {theirs['weights']} {found['test']}")
    headings = ("weights", "", "RetNet tokens/s", "llama.cpp tokens/s", "RetNet is as fast", "GB in use", "of no file")
    counts, sizes = document["parameters"], document["weight_bytes"]
    packages, flash = document["libraries"], "on" if document["flash_attention"] else "off"
    parts = [
        f"{document['size']}: {counts['retnet'] / 1e6:,.1f} million parameters, the Llama "
        f"{counts['llama.cpp'] / 1e6:,.1f}; {', '.join(f'{name} {gigabytes(sizes[name])} GB' for name in sizes)}; "
        f"{document['threads']} threads; llama-cpp-python {packages['llama_cpp_python']}, flash attention {flash}, "
        f"cache in {document['cache']}. Pairs are RetNet / llama.cpp.",
        f"Opening takes {', '.join(opening)}.",
    ]
    if any(found["made_again"] for found in document["results"]):
        parts.append("(again): repetitions that deviated by more than 10% of the median were made once more.")
    if noisy := [f"{f['retnet']['weights']} {f['test']}" for f in document["results"] if f["deviating"]]:
        parts.append(f"Some still deviate by more than that: {'; '.join(noisy)}.")
    return "\n\n".join((table(headings, lines), " ".join(parts), origin(document)))


def marks(row: Document) -> str:
    """Whether rounds were made again, and whether one is still off by more than 10%."""
    return (" (again)" if row["made_again"] else "") + (" (deviates)" if row["deviating"] else "")


def opening(document: Document, *further: Document) -> str:
    """What a process takes: records of opening.py; where an older tree was measured too, both are in a cell."""
    rows = (row for each in (document, *further) for row in each["results"])
    found = {(row["size"], row["weights"], row["tree"]): row for row in rows}
    lines = []
    for (size, kind, tree), row in found.items():
        if tree != "now":
            continue
        sides = [side for name in ("before", "now") if (side := found.get((size, kind, name))) is not None]

        def cell(name: str, form: Callable[[float], str] = number, sides: Sequence[Document] = sides) -> str:
            return " / ".join(form(side[name]) if name in side else "-" for side in sides)

        lines.append(
            [
                f"{size} {kind}{marks(row)}",
                f"{row['reading_seconds']:.2f}",
                f"{row['opening_first_seconds']:.2f}",
                cell("opening_seconds", "{:.2f}".format),
                cell("first_token_seconds", "{:.2f}".format),
                *(cell(name) for name in ("prompt_tokens_per_second", "ms_per_token")),
                *(cell(name) for name in ("scoring_one_row", "scoring_rows")),
                *(cell(f"{name}_bytes", gigabytes) for name in ("peak_resident", "anonymous", "second_own")),
            ]
        )
    headings = [
        *("", "reading weights.data, s", "opening the first time, s", "opening, s", "first token, s"),
        *("prompt, tokens/s", "ms a token", "scored in one row, tokens/s", "in rows"),
        *("GB in use at most", "of no file", "a second process's own"),
    ]
    about = f"{document['threads']} threads, a prompt of {document['prompt']} tokens, rows of {document['row']}."
    if document["before"]:
        about = f"Pairs are of commit {document['before'][:7]} / now, in turns. {about}"
    return f"{table(headings, lines)}\n\n{about}\n\n{origin(document, *further)}"
