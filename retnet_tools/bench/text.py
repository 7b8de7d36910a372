"""A benchmark for people: tables on a terminal, in Markdown and in CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Literal, get_args

from retnet_tools.bench.options import RETNET
from retnet_tools.bench.results import BenchReport, BenchRow, Flatness, StepProfile
from retnet_tools.console import ResultTable, print_line, result_console
from retnet_tools.errors import UsageError, did_you_mean

Format = Literal["table", "md", "csv", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)
Table = tuple[list[str], list[list[str]]]
Column = tuple[str, Callable[[BenchRow], str]]


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
        # What a line of the measured tests is about stands before its threads.
        table = ResultTable(*headings, keys=headings.index("threads") if "threads" in headings else 1)
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
    """The rows with all of their fields, what there is of each repetition separated by semicolons."""
    output = io.StringIO()
    fields = list(BenchRow.__dataclass_fields__)
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(fields)
    for row in report.rows:
        values = {
            name: ";".join(map(str, value)) if isinstance(value, tuple) else value
            for name, value in asdict(row).items()
        }
        writer.writerow(["" if values[name] is None else values[name] for name in fields])
    return output.getvalue().rstrip("\n")


def _parts(report: BenchReport) -> Iterator[str | Table]:
    yield from _heading(report)
    if report.rows:
        yield _rows(report)
        yield from _footer(report)
    for skip in report.skipped:
        threads = "all" if skip.threads is None else str(skip.threads)
        where = f"{skip.implementation} {skip.test}, batch {skip.batch}, {threads} threads"
        count = f"measured {skip.repetitions} times only" if skip.repetitions else "not measured"
        yield f"{where}: {count}, {skip.reason}"
    if report.rows and report.model.in_cache and report.device == "cpu":
        cache = report.model.last_cache_bytes / 1e6
        yield f"The weights fit into the processor's cache of {cache:.0f} MB: memory does not limit this model."
    if report.flat is not None:
        yield from _flat(report.flat, report.model.quantization)
    if report.profile is not None:
        yield from _profile(report.profile, report.rows)


def _heading(report: BenchReport) -> Iterator[str]:
    model, machine = report.model, report.machine
    weights = f"{model.dtype}, {model.quantization}" if model.quantization else model.dtype
    yield f"{model.name}: {model.parameters / 1e6:.1f} million parameters, {weights}, {model.ops} operators"
    memory = "" if machine.memory_bytes is None else f", {machine.memory_bytes / 2**30:.0f} GiB"
    yield f"{report.device_name or report.device}; {machine.processor}, {machine.cores} cores{memory}"
    if report.rows:
        bandwidths = [row.read_bandwidth for row in report.rows]
        verb = "reads" if report.rows[0].device == "cpu" else "copies"
        text = f"{verb} {min(bandwidths) / 1e9:.1f} to {max(bandwidths) / 1e9:.1f} GB/s"
        rates = [row.product_rate for row in report.rows if row.product_rate is not None]
        yield text + (f"; matrix products at {max(rates) / 1e9:.0f} GFLOP/s" if rates else "")


def _rows(report: BenchReport) -> Table:
    return _table(_columns(report.rows), report.rows)


def _columns(rows: Sequence[BenchRow]) -> list[Column]:
    """Heading and cell of each column, left out where no row has anything to say in it."""
    several = len({row.implementation for row in rows}) > 1
    prompts = any(row.kind == "prefill" for row in rows)
    gpu = any(row.device != "cpu" for row in rows)
    found: list[tuple[bool, Column]] = [
        (several, ("implementation", lambda row: row.implementation)),
        (True, ("test", lambda row: row.test)),
        (True, ("batch", lambda row: str(row.batch))),
        (True, ("threads", lambda row: "all" if row.threads is None else str(row.threads))),
        (gpu, ("device", lambda row: row.device)),
        (gpu, ("CUDA graph", lambda row: {None: "-", True: "yes", False: "no"}[row.cuda_graph])),
        (True, ("tokens/s", _rate)),
        (True, ("ms p50", lambda row: f"{row.ms_per_token_p50:.3f}")),
        (True, ("ms p99", lambda row: f"{row.ms_per_token_p99:.3f}")),
        (True, ("MB a token", lambda row: _megabytes(row.bytes_per_token))),
        (True, ("of copy limit" if gpu else "of read limit", lambda row: f"{row.floor_share:.0%}")),
        (prompts, ("first token ms", lambda row: _optional(row.ms_to_first_token, "{:.1f}"))),
        (prompts, ("of product limit", lambda row: _optional(row.product_share, "{:.0%}"))),
        (True, ("MB a sequence", lambda row: _megabytes(row.state_bytes_per_sequence * row.state_buffers))),
        (
            any(row.memory_per_sequence is not None for row in rows),
            ("measured", lambda row: _megabytes(row.memory_per_sequence)),
        ),
        (True, ("MB resident", lambda row: _megabytes(row.peak_resident_bytes))),
        (gpu, ("MB on GPU", lambda row: _megabytes(row.device_bytes))),
        (several, ("RetNet is", lambda row: _optional(row.retnet_speedup, "{:.2f} times as fast"))),
    ]
    return [column for shown, column in found if shown]


def _footer(report: BenchReport) -> Iterator[str]:
    count = report.options.repetitions
    yield (
        f"tokens/s: mean ± standard deviation of {count} repetitions, each in new processes; ms: of single steps. "
        "Shares of limits, and how many times as fast: median of the ratios within each repetition. "
        "MB a sequence: computed, all buffers of states or cache."
    )


def _table(columns: Sequence[Column], rows: Sequence[BenchRow]) -> Table:
    return [heading for heading, _ in columns], [[cell(row) for _, cell in columns] for row in rows]


def _rate(row: BenchRow) -> str:
    deviation = "" if row.tokens_per_second_std is None else f" ± {row.tokens_per_second_std:.2f}"
    return f"{row.tokens_per_second:.2f}{deviation}"


def _flat(flat: Flatness, quantization: str | None) -> Iterator[str | Table]:
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
    if quantization is not None and any(p.max_abs is not None for p in flat.positions):
        yield f"The float64 logits are of the float weights: differences include those of {quantization}."
    first, last = flat.positions[0], flat.positions[-1]
    verdict = "no difference" if flat.equal else "a difference"
    yield (
        f"ten times the position: {flat.slope:+.4f} ms ({flat.slope_low:+.4f} to {flat.slope_high:+.4f}, 95%); "
        f"{first.position:,} to {last.position:,}: {flat.difference:+.4f} ms "
        f"({flat.difference_low:+.4f} to {flat.difference_high:+.4f}), {verdict}; "
        f"at most {flat.largest_share:.1%} of a step within that interval"
    )


def _profile(profile: StepProfile, measured: Sequence[BenchRow]) -> Iterator[str | Table]:
    launches = profile.device != "cpu"
    threads = "all" if profile.threads is None else str(profile.threads)
    case = f"{profile.test}, batch {profile.batch}, {threads} threads"
    beside = [
        row.ms_per_token_p50
        for row in measured
        if row.implementation == RETNET
        and row.kind == "decode"
        and (row.batch, row.threads) == (profile.batch, profile.threads)
        and row.test.partition(" @ ")[2] == profile.test.partition(" @ ")[2]
    ]
    without = f", {beside[0]:.3f} ms without it" if beside else ""
    what = "launching kernels one by one" if launches else "a step"
    yield f"Profile of RetNet {case}: {what} takes {profile.ms:.3f} ms; taking the profile costs time{without}."
    rows = [[p.operator, f"{p.calls:.0f}", f"{p.ms:.3f}", f"{p.share:.1%}"] for p in profile.operators]
    rest = profile.outside_ms / profile.ms if profile.ms else 0.0
    rows.append(["outside operators", "", f"{profile.outside_ms:.3f}", f"{rest:.1%}"])
    yield ["operator", "calls a step", "launch ms a step" if launches else "ms a step", "share"], rows


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _megabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f}" if count < 1e9 else f"{count / 1e6:,.0f}"


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"| {' | '.join('---' for _ in headings)} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"
