"""Puts the recorded benchmarks into docs/benchmarks.md, between its markers, and draws them.

    python benchmarks/docs_tables.py            rewrite docs/benchmarks.md
    python benchmarks/docs_tables.py --check    exit code 1 where it is not what the records say

`<!-- bench:NAME -->` and `<!-- /bench:NAME -->` enclose what NAME of `SECTIONS` makes of the records in
benchmarks/bench/ (`benchmarks/record.py`). A section whose records are not there is left as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from docs_cells import (
    ALTERNATIVES,
    Document,
    gigabytes,
    memory,
    number,
    origin,
    sequence,
    skipped,
    spread,
    table,
    threads,
    title,
    weights,
)
from docs_script_tables import llama_cpp, official, opening

from retnet_tools.bench.plot import write_bench_plot
from retnet_tools.bench.results import BenchReport
from retnet_tools.fields import from_json

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "bench"
PAGE = "docs/benchmarks.md"
PICTURES = ("context", "flat")
SCHEMA_VERSION = 3
TYPES = ("float32", "float16", "int8", "int4")
LONG_CONTEXT = 8192
"""The paper's headline is about this many tokens."""


def load(device: str, name: str) -> Document | None:
    """A record, or None."""
    path = FOLDER / f"{device}-{name}.json"
    return read(path) if path.is_file() else None


def read(path: Path) -> Document:
    """A record; ends the program where it is of another version."""
    document: Document = json.loads(path.read_text(encoding="utf-8"))
    if document["schema_version"] != SCHEMA_VERSION:
        sys.exit(f"{path.name} has schema version {document['schema_version']}, not {SCHEMA_VERSION}: record it again")
    return document


def loaded(device: str, names: Iterable[str]) -> list[Document]:
    """The records that are there."""
    return [document for name in names if (document := load(device, name))]


def decoding(device: str) -> str | None:
    """One sequence, in every type."""
    documents = loaded(device, (*TYPES, "float16-eager"))
    if not documents:
        return None
    rows = [row for document in documents for row in document["rows"] if row["kind"] == "decode"]
    lines = [
        [
            title(row) + (", kernel by kernel" if row["cuda_graph"] is False else ""),
            weights(row),
            threads(row),
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
    limit = "GB/s read" if device == "cpu" else "GB/s copied"
    headings = ("", "weights", "threads", "tokens/s", "ms p50", "ms p99", "GB a token", limit, "of that limit")
    return f"{table((*headings, 'GB in use'), lines)}\n\n{origin(*documents)}"


def prompts(device: str) -> str | None:
    """Prompts: RetNet in every type, and beside the Transformer."""
    documents = loaded(device, (*TYPES, "transformer-prompt"))
    rows = [row for document in documents for row in document["rows"] if row["kind"] == "prefill"]
    if not rows:
        return None
    lines = [
        [
            title(row),
            weights(row),
            threads(row),
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
    state = {row["test"]: sequence(row) for row in rows if row["implementation"] == "retnet"}
    lines = [
        [
            title(row),
            f"{row['depth']:,}",
            str(row["batch"]),
            spread(row),
            "" if row["retnet_speedup"] is None else f"{row['retnet_speedup']:.2f} times",
            gigabytes(sequence(row)),
            f"{state[row['test']] / sequence(row):.1%}" if title(row) != "RetNet" and row["test"] in state else "",
            gigabytes(row.get("memory_per_sequence")),
            gigabytes(memory(row)),
        ]
        for row in rows
    ]
    headings = (
        *("", "context", "batch", "tokens/s", "RetNet is as fast", "GB a sequence, computed", "RetNet's part of that"),
        *("GB a sequence, measured over batches", "GB in use"),
    )
    return "\n\n".join(filter(None, (table(headings, lines), skipped(document), origin(document))))


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
    drawn = picture(device, "context", "Latency, throughput and memory against context and batch")
    return "\n\n".join(filter(None, (drawn, table(headings, lines), skipped(document), origin(document))))


def positions(device: str) -> str | None:
    """Decoding far out."""
    documents = loaded(device, ("flat", "flat-float32"))
    if not documents:
        return None
    lines = []
    for document in documents:
        flat, model = document["flat"], document["model"]
        lines.append(
            [
                weights(model),
                *(f"{place['ms_per_token']:.2f}" for place in flat["positions"]),
                f"{flat['difference']:+.2f} ({flat['difference_low']:+.2f} to {flat['difference_high']:+.2f})",
                f"{flat['largest_share']:.1%}",
                " / ".join("-" if p["max_abs"] is None else f"{p['max_abs']:.1e}" for p in flat["positions"]),
                f"{max(p['logits_scale'] for p in flat['positions']):.3g}",
            ]
        )
    places = [f"ms at {place['position']:,}" for place in documents[0]["flat"]["positions"]]
    headings = ["weights", *places, "ms over the range (95%)", "at most, of a step"]
    headings += ["largest difference of a logit from the float weights' in float64, at each", "largest logit"]
    drawn = picture(device, "flat", "Latency and throughput at positions up to a million")
    return f"{drawn}\n\n{table(headings, lines)}\n\n{origin(*documents)}"


def operators(device: str) -> str | None:
    """Where a step's time goes."""
    documents = [document for document in loaded(device, TYPES) if document["profile"]]
    if not documents:
        return None
    names = [weights(document["model"]) for document in documents]
    profiles = [document["profile"] for document in documents]
    shares = [{entry["operator"]: entry for entry in profile["operators"]} for profile in profiles]
    total = {name: sum(part[name]["share"] for part in shares if name in part) for part in shares for name in part}
    lines = [
        [name, *(f"{part[name]['ms']:.2f} ({part[name]['share']:.1%})" if name in part else "" for part in shares)]
        for name in sorted(total, key=lambda name: -total[name])
        if total[name] > 0.01 * len(shares)
    ]
    outside = [f"{p['outside_ms']:.2f} ({p['outside_ms'] / p['ms']:.1%})" for p in profiles]
    lines += [["outside operators", *outside], ["the whole step, profiled", *(f"{p['ms']:.2f}" for p in profiles)]]
    kind = "ms a step" if device == "cpu" else "ms to launch a step, kernel by kernel"
    first = profiles[0]
    case = f"Profiled: {first['test']}, batch {first['batch']}, {first['threads'] or 'all'} threads."
    return f"{table([f'operator, {kind}', *names], lines)}\n\n{case}"


def beside(make: Callable[..., str], *records: str) -> Callable[[str], str | None]:
    """The part that makes a table of records beside this script; of the CPU."""

    def part(device: str) -> str | None:
        paths = [ROOT / "benchmarks" / f"{record}.json" for record in records]
        found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
        return make(*found) if device == "cpu" and found else None

    return part


def recorded(_: str) -> str:
    """How far the figures can be trusted, in a sentence."""
    documents = [read(path) for path in sorted(FOLDER.glob("*.json"))]
    if not documents:
        return "No run on a quiet machine has been recorded yet."
    rows = sum(len(document["rows"]) for document in documents)
    noisy = sum(len(document["noisy"]) for document in documents)
    days = sorted({document["recorded"] for document in documents})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"Recorded {when}: {rows} rows, of which {noisy} deviate by more than 5% between repetitions."


PARTS: dict[str, Callable[[str], str | None]] = {
    "decode": decoding,
    "official": beside(official, "torchscale_step"),
    "llama": beside(llama_cpp, "llama_cpp"),
    "opening": beside(opening, "opening", "opening_6.7b"),
    "before": beside(opening, "opening_before"),
    "prefill": prompts,
    "transformer": against_transformer,
    "context": contexts,
    "flat": positions,
    "operators": operators,
}
SECTIONS = {f"{device}-{name}": (device, part) for device in ("cpu", "cuda") for name, part in PARTS.items()}
SECTIONS |= {"recorded": ("", recorded)}


def rewritten(text: str) -> str:
    """The page with every section that can be made."""

    def section(match: re.Match[str]) -> str:
        name = match[1]
        if name not in SECTIONS:
            sys.exit(f"{PAGE} has a marker bench:{name}; there are {', '.join(SECTIONS)}")
        device, part = SECTIONS[name]
        content = part(device)
        return match[0] if content is None else f"<!-- bench:{name} -->\n{content}\n<!-- /bench:{name} -->"

    return re.sub(r"<!-- bench:([a-z0-9-]+) -->\n.*?<!-- /bench:\1 -->", section, text, flags=re.DOTALL)


def draw_pictures() -> None:
    """A picture of each record that has one, where there is matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures: there is no matplotlib", file=sys.stderr)
        return
    for path in sorted(path for path in FOLDER.glob("*.json") if path.stem.partition("-")[2] in PICTURES):
        document = read(path)
        report = from_json(BenchReport, {name: document[name] for name in BenchReport.__dataclass_fields__})
        write_bench_plot(report, path.with_suffix(".svg"), force=True)


def picture(device: str, name: str, text: str) -> str:
    """The picture of a record."""
    return f"![{text}](../benchmarks/bench/{device}-{name}.svg)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    arguments = parser.parse_args()
    page = ROOT / PAGE
    old = page.read_text(encoding="utf-8")
    new = rewritten(old)
    if arguments.check:
        sys.exit(0 if old == new else f"{PAGE} is not what benchmarks/bench/ says: run benchmarks/docs_tables.py")
    page.write_text(new, encoding="utf-8")
    draw_pictures()


if __name__ == "__main__":
    main()
