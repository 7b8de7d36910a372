"""Puts the recorded benchmarks into README.md, between its markers.

    python benchmarks/readme_tables.py            rewrite README.md
    python benchmarks/readme_tables.py --check    exit code 1 where it is not what the records say

`<!-- bench:NAME -->` and `<!-- /bench:NAME -->` enclose what NAME of `SECTIONS` makes of the records in
benchmarks/bench/ (`benchmarks/record.py`). A section whose records are not there is left as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "bench"
Row = dict[str, Any]
Document = dict[str, Any]
LONG_CONTEXT = 8192
"""The paper's headline is about this many tokens."""
NAMES = {"retnet": "RetNet", "torch": "torch, recurrent form"}
ALTERNATIVES = {"transformer": "Transformer", "transformer-gqa": "Transformer, a quarter of the KV heads"}


def load(device: str, name: str) -> Document | None:
    """A record, or None."""
    path = FOLDER / f"{device}-{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def origin(*documents: Document) -> str:
    """What it was measured on, and the commands."""
    first = documents[0]
    machine = first["machine"]
    memory = "" if machine["memory_bytes"] is None else f", {machine['memory_bytes'] / 2**30:.0f} GiB"
    device = f"{first['device_name']}; " if first["device_name"] else ""
    days = sorted({document["recorded"] for document in documents})
    commands = "\n".join(document["command"] for document in documents)
    text = f"{device}{machine['processor']}, {machine['cores']} cores{memory}; {' and '.join(days)}:"
    return f"{text}\n\n```\n{commands}\n```"


def title(row: Row) -> str:
    name = row["implementation"]
    return (NAMES | ALTERNATIVES)[name]


def weights(row: Row) -> str:
    return row["quantization"] or row["dtype"]


def spread(row: Row) -> str:
    deviation = row["tokens_per_second_std"]
    return f"{number(row['tokens_per_second'])}" + ("" if deviation is None else f" ± {number(deviation)}")


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def gigabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e9:.2f}"


def memory(row: Row) -> float | None:
    return row["peak_resident_bytes"] if row["device_bytes"] is None else row["device_bytes"]


def decoding(device: str) -> str | None:
    """One sequence, in every type."""
    names = ("float32", "float16", "int8", "int4")
    documents = [document for name in names if (document := load(device, name))]
    if not documents:
        return None
    rows = [row for document in documents for row in document["rows"] if row["kind"] == "decode"]
    lines = [
        [
            title(row),
            weights(row),
            str(row["threads"] or "all"),
            spread(row),
            f"{row['ms_per_token_p50']:.1f}",
            f"{row['ms_per_token_p99']:.1f}",
            f"{row['bytes_per_token'] / 1e9:.2f}",
            f"{row['read_bandwidth'] / 1e9:.1f}",
            f"{row['floor_share']:.0%}",
            gigabytes(memory(row)),
        ]
        for row in rows
    ]
    headings = ("", "weights", "threads", "tokens/s", "ms p50", "ms p99", "GB a token", "GB/s read", "of that limit")
    return f"{table((*headings, 'GB in use'), lines)}\n\n{origin(*documents)}"


def prompts(device: str) -> str | None:
    """Prompts: RetNet in every type, and beside the Transformer."""
    names = ("float32", "float16", "int8", "int4", "transformer-prompt")
    documents = [document for name in names if (document := load(device, name))]
    rows = [row for document in documents for row in document["rows"] if row["kind"] == "prefill"]
    if not rows:
        return None
    lines = [
        [
            title(row),
            weights(row),
            str(row["threads"] or "all"),
            row["test"],
            spread(row),
            number(row["ms_to_first_token"]),
            f"{row['product_share']:.0%} of {row['product_rate'] / 1e9:,.0f} GFLOP/s",
        ]
        for row in rows
    ]
    headings = ("", "weights", "threads", "prompt", "tokens/s", "ms to the first token", "of a measured matrix product")
    return f"{table(headings, lines)}\n\n{origin(*documents)}"


def against_transformer(device: str) -> str | None:
    """A long context: throughput, and memory of a sequence."""
    document = load(device, "transformer") or load(device, "context")
    if document is None:
        return None
    rows = [row for row in document["rows"] if row["depth"] == LONG_CONTEXT]
    state = {row["test"]: row["state_bytes_per_sequence"] for row in rows if row["implementation"] == "retnet"}
    lines = [
        [
            title(row),
            f"{row['depth']:,}",
            str(row["batch"]),
            spread(row),
            "" if row["retnet_speedup"] is None else f"{row['retnet_speedup']:.2f} times",
            gigabytes(row["state_bytes_per_sequence"]),
            "" if row["retnet_speedup"] is None else f"{state[row['test']] / row['state_bytes_per_sequence']:.1%}",
            gigabytes(memory(row)),
        ]
        for row in rows
    ]
    headings = ("", "context", "batch", "tokens/s", "RetNet is as fast", "GB a sequence", "RetNet's part", "GB in use")
    return f"{table(headings, lines)}\n\n{_skipped(document)}{origin(document)}"


def contexts(device: str) -> str | None:
    """Figure 6 of the paper: what happens with the context and the batch."""
    document = load(device, "context")
    if document is None:
        return None
    found = {(row["implementation"], row["depth"], row["batch"]): row for row in document["rows"]}
    others = [name for name in ALTERNATIVES if any(key[0] == name for key in found)]
    lines = []
    for depth in sorted({key[1] for key in found}):
        for batch in sorted({key[2] for key in found}):
            cells = [f"{depth:,}", str(batch)]
            for name in ("retnet", *others):
                row = found.get((name, depth, batch))
                cells += ["-", "-"] if row is None else [number(row["tokens_per_second"]), gigabytes(memory(row))]
            lines.append(cells)
    headings = ["context", "batch", "RetNet tokens/s", "GB"]
    for name in others:
        headings += [f"{ALTERNATIVES[name]} tokens/s", "GB"]
    picture = f"![Latency, throughput and memory against context and batch](benchmarks/bench/{device}-context.svg)"
    note = "`-`: does not fit into memory." if document["skipped"] else ""
    return "\n\n".join(filter(None, (picture, table(headings, lines), note, origin(document))))


def positions(device: str) -> str | None:
    """Decoding far out."""
    documents = [document for name in ("flat", "flat-float32") if (document := load(device, name))]
    if not documents:
        return None
    lines = []
    for document in documents:
        flat = document["flat"]
        lines.append(
            [
                document["model"]["quantization"] or document["model"]["dtype"],
                *(f"{place['ms_per_token']:.2f}" for place in flat["positions"]),
                f"{flat['difference']:+.2f} ({flat['difference_low']:+.2f} to {flat['difference_high']:+.2f})",
                " / ".join("-" if p["max_abs"] is None else f"{p['max_abs']:.1e}" for p in flat["positions"]),
            ]
        )
    places = [f"ms at {place['position']:,}" for place in documents[0]["flat"]["positions"]]
    headings = ["weights", *places, "ms over the range (95%)", "logits from float64 at each"]
    return f"{table(headings, lines)}\n\n{origin(*documents)}"


def operators(device: str) -> str | None:
    """Where a step's time goes."""
    documents = [d for name in ("float32", "float16", "int8", "int4") if (d := load(device, name)) and d["profile"]]
    if not documents:
        return None
    names = [document["model"]["quantization"] or document["model"]["dtype"] for document in documents]
    shares = [{entry["operator"]: entry for entry in document["profile"]} for document in documents]
    total = {name: sum(part[name]["share"] for part in shares if name in part) for part in shares for name in part}
    lines = [
        [name, *(f"{part[name]['ms']:.2f} ({part[name]['share']:.1%})" if name in part else "" for part in shares)]
        for name in sorted(total, key=lambda name: -total[name])
        if total[name] > 0.01 * len(shares)
    ]
    return table(["operator, ms a step", *names], lines)


def official(device: str) -> str | None:
    """Against torchscale itself."""
    path = ROOT / "benchmarks" / "torchscale_step.json"
    if device != "cpu" or not path.is_file():
        return None
    document = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        [entry["implementation"], number(entry["ms_per_token"]), f"{entry['times_official']:.2f}"]
        for entry in document["results"]
    ]
    return table(["", "ms a token", "times as fast"], lines)


def _skipped(document: Document) -> str:
    notes = [f"{s['implementation']} at batch {s['batch']}: {s['reason']}." for s in document["skipped"]]
    return "\n".join(notes) + ("\n\n" if notes else "")


PARTS: dict[str, Callable[[str], str | None]] = {
    "decode": decoding,
    "official": official,
    "prefill": prompts,
    "transformer": against_transformer,
    "context": contexts,
    "flat": positions,
    "operators": operators,
}
SECTIONS = {f"{device}-{name}": (device, part) for device in ("cpu", "cuda") for name, part in PARTS.items()}


def rewritten(text: str) -> str:
    """README with every section that can be made."""

    def section(match: re.Match[str]) -> str:
        name = match[1]
        if name not in SECTIONS:
            sys.exit(f"README.md has a marker bench:{name}; there are {', '.join(SECTIONS)}")
        device, part = SECTIONS[name]
        content = part(device)
        return match[0] if content is None else f"<!-- bench:{name} -->\n{content}\n<!-- /bench:{name} -->"

    return re.sub(r"<!-- bench:([a-z0-9-]+) -->\n.*?<!-- /bench:\1 -->", section, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether README.md is up to date")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = rewritten(old)
    if arguments.check:
        sys.exit(0 if old == new else "README.md is not what benchmarks/bench/ says: run benchmarks/readme_tables.py")
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
