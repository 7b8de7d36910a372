"""A benchmark for people: tables on a terminal, in Markdown and in CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Literal, get_args

from retnet_tools.errors import UsageError, did_you_mean
from retnet_tools.reports.benchmark.results import BenchReport, BenchRow, Flatness
from retnet_tools.reports.render import print_line, result_console, result_table

Format = Literal["table", "md", "csv", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)
Table = tuple[list[str], list[list[str]]]


def parse_format(text: str) -> Format:
    """A format by its name.

    Raises:
        UsageError: another name.
    """
    for name in FORMATS:
        if text.strip().lower() == name:
            return name
    raise UsageError(f"--format {text!r}", f"one of {', '.join(FORMATS)}", did_you_mean(text, FORMATS))


def render_benchmark(report: BenchReport) -> None:
    """Print a report with a table for each part."""
    console = result_console()
    for part in _parts(report):
        if isinstance(part, str):
            print_line(console, part)
            continue
        headings, rows = part
        table = result_table(*headings)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def markdown(report: BenchReport) -> str:
    """A report in Markdown."""
    blocks = []
    for part in _parts(report):
        if isinstance(part, str):
            blocks.append(part)
        else:
            blocks.append("\n".join(_markdown_table(*part)))
    return "\n\n".join(blocks)


def comma_separated(report: BenchReport) -> str:
    """The rows with all of their fields, repetitions separated by semicolons."""
    output = io.StringIO()
    fields = list(BenchRow.__dataclass_fields__)
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(fields)
    for row in report.rows:
        values = asdict(row) | {"repetitions": ";".join(map(str, row.repetitions))}
        writer.writerow(["" if values[name] is None else values[name] for name in fields])
    return output.getvalue().rstrip("\n")


def _parts(report: BenchReport) -> Iterator[str | Table]:
    yield from _heading(report)
    if report.rows:
        yield _rows(report)
    for skip in report.skipped:
        yield f"{skip.implementation} {skip.test}, batch {skip.batch}: not measured, {skip.reason}"
    if report.rows and report.model.in_cache and report.device == "cpu":
        cache = report.model.last_cache_bytes / 1e6
        yield f"The weights fit into the processor's cache of {cache:.0f} MB: memory does not limit this model."
    if report.flat is not None:
        yield from _flat(report.flat)
    if report.profile is not None:
        rows = [[p.operator, f"{p.calls:.0f}", f"{p.ms:.3f}", f"{p.share:.1%}"] for p in report.profile]
        yield ["operator", "calls a step", "ms a step", "share"], rows


def _heading(report: BenchReport) -> Iterator[str]:
    model, machine = report.model, report.machine
    weights = f"{model.dtype}, {model.quantization}" if model.quantization else model.dtype
    yield f"{model.name}: {model.parameters / 1e6:.1f} million parameters, {weights}, {model.ops} operators"
    memory = "" if machine.memory_bytes is None else f", {machine.memory_bytes / 2**30:.0f} GiB"
    yield f"{report.device}; {machine.processor}, {machine.cores} cores{memory}"
    if report.rows:
        bandwidths = [row.read_bandwidth for row in report.rows]
        text = f"reads {min(bandwidths) / 1e9:.1f} to {max(bandwidths) / 1e9:.1f} GB/s"
        rates = [row.product_rate for row in report.rows if row.product_rate is not None]
        yield text + (f"; matrix products at {max(rates) / 1e9:.0f} GFLOP/s" if rates else "")


def _rows(report: BenchReport) -> Table:
    rows = report.rows
    several = len({row.implementation for row in rows}) > 1
    prompts = any(row.kind == "prefill" for row in rows)
    gpu = any(row.device_bytes is not None for row in rows)
    headings = ["implementation"] if several else []
    headings += ["test", "batch", "threads", "tokens/s", "ms p50", "ms p99", "MB a token", "of read limit"]
    headings += ["first token ms", "of product limit"] if prompts else []
    headings += ["MB a sequence", "MB resident", *(["MB on GPU"] if gpu else []), *(["RetNet is"] if several else [])]
    return headings, [_cells(row, several=several, prompts=prompts, gpu=gpu) for row in rows]


def _cells(row: BenchRow, *, several: bool, prompts: bool, gpu: bool) -> list[str]:
    deviation = "" if row.tokens_per_second_std is None else f" ± {row.tokens_per_second_std:.2f}"
    cells = [row.implementation] if several else []
    cells += [row.test, str(row.batch), "all" if row.threads is None else str(row.threads)]
    cells += [f"{row.tokens_per_second:.2f}{deviation}", f"{row.ms_per_token_p50:.3f}", f"{row.ms_per_token_p99:.3f}"]
    cells += [_megabytes(row.bytes_per_token), f"{row.floor_share:.0%}"]
    if prompts:
        cells.append("" if row.ms_to_first_token is None else f"{row.ms_to_first_token:.1f}")
        cells.append("" if row.product_share is None else f"{row.product_share:.0%}")
    cells += [_megabytes(row.state_bytes_per_sequence), _megabytes(row.peak_resident_bytes)]
    cells += [_megabytes(row.device_bytes)] if gpu else []
    if several:
        cells.append("" if row.retnet_speedup is None else f"{row.retnet_speedup:.2f} times as fast")
    return cells


def _flat(flat: Flatness) -> Iterator[str | Table]:
    rows = [
        [
            f"{p.position:,}",
            f"{p.ms_per_token:.3f} ± {p.ms_per_token_std:.3f}",
            "-" if p.max_abs is None else f"{p.max_abs:.1e}",
            f"{p.logits_scale:.3g}",
        ]
        for p in flat.positions
    ]
    yield ["position", "ms a token", "max abs from float64", "largest logit"], rows
    first, last = flat.positions[0], flat.positions[-1]
    verdict = "no difference" if flat.equal else "a difference"
    yield (
        f"ten times the position: {flat.slope:+.4f} ms ({flat.slope_low:+.4f} to {flat.slope_high:+.4f}, 95%); "
        f"{first.position:,} to {last.position:,}: {flat.difference:+.4f} ms "
        f"({flat.difference_low:+.4f} to {flat.difference_high:+.4f}), {verdict}"
    )


def _megabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f}" if count < 1e9 else f"{count / 1e6:,.0f}"


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"| {' | '.join('---' for _ in headings)} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"
