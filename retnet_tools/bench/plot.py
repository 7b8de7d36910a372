"""A picture of a benchmark: latency, throughput and memory of prompts, of decoding and of far positions.

A row of panels for each of them, a column for each quantity, in one unit. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from retnet_tools.bench.options import Kind
from retnet_tools.bench.results import BenchReport, BenchRow, Flatness
from retnet_tools.bench.rows import memory_in_use
from retnet_tools.errors import RetNetToolsError
from retnet_tools.plotting import COLOURS, check_plot, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT, _BAR_HEIGHT = 4.3, 3.4, 0.5
_TITLE_HEIGHT = 1.2


@dataclass(frozen=True)
class Quantity:
    """What a column shows.

    Attributes:
        value: of a row; None where it is not known.
        error: its standard deviation, where there is one.
        unit: of all its panels; empty for bytes, in the unit that fits the largest value.
    """

    label: str
    unit: str
    value: Callable[[BenchRow], float | None]
    error: Callable[[BenchRow], float | None] = lambda row: None

    def scaled(self, rows: Sequence[BenchRow]) -> tuple[str, float]:
        """The label with its unit, and what to divide values by."""
        if self.unit:
            return f"{self.label}, {self.unit}", 1.0
        largest = max((self.value(row) or 0.0 for row in rows), default=0.0)
        unit, size = next((u for u in (("GB", 1e9), ("MB", 1e6)) if largest >= u[1]), ("kB", 1e3))
        return f"{self.label}, {unit}", size


QUANTITIES = (
    Quantity("a step (median)", "ms", lambda row: row.ms_to_first_token or row.ms_per_token_p50),
    Quantity("throughput", "tokens/s", lambda row: row.tokens_per_second, lambda row: row.tokens_per_second_std),
    Quantity("memory of the process, weights included", "", memory_in_use),
    Quantity("state or cache of a sequence", "", lambda row: row.state_bytes_per_sequence),
)
Line = tuple[str, float, Callable[[Sequence["Axes"]], None]]
"""A row of panels: its title, its height, and what draws it."""


def write_bench_plot(report: BenchReport, path: Path, *, force: bool) -> None:
    """Draw a report; the file appears whole or not at all.

    Raises:
        RetNetToolsError, UsageError, OutputError: as `retnet_tools.plotting.save_figure`.
    """
    check_plot(path, force=force)
    save_figure(draw(report), path, force=force)


def draw(report: BenchReport) -> Figure:
    """The figure. Its title is the model; machine, and what was measured and is not drawn, stand below.

    Prompts are bars. Decoding is curves against the context and the batch where they vary, of one number of threads and
    of tokens, else bars.

    Raises:
        RetNetToolsError: nothing was measured that could be drawn.
    """
    from matplotlib.figure import Figure

    if not report.rows and report.flat is None:
        raise RetNetToolsError("--plot of a benchmark without rows", action="measure something that memory allows")
    decoding = [row for row in report.rows if row.kind == "decode"]
    chosen = _compared(decoding)
    lines = [*_lines(report.rows, chosen, "prefill"), *_lines(report.rows, chosen, "decode")]
    if report.flat is not None:
        lines.append(("Decoding far out, one sequence", _HEIGHT, partial(_positions, flat=report.flat)))
    heights = [height for _, height, _ in lines]
    figure = Figure(figsize=(_WIDTH * len(QUANTITIES), sum(heights) + _TITLE_HEIGHT), layout="constrained")
    grid = figure.subplots(len(lines), len(QUANTITIES), squeeze=False, height_ratios=heights)
    for (title, _, drawer), axes in zip(lines, grid, strict=True):
        axes[0].set_title(title, loc="left", fontsize=11, fontweight="bold", pad=12)
        drawer(axes)
    model, machine = report.model, report.machine
    types = f"{model.dtype}, {model.quantization}" if model.quantization else model.dtype
    figure.suptitle(f"RetNet {model.name}: {model.parameters / 1e6:,.0f} million parameters, {types}", fontsize=13)
    where = f"{report.device_name or report.device}; {machine.processor}, {machine.cores} cores"
    figure.supxlabel("\n".join(filter(None, (where, _left_out(decoding, chosen)))), fontsize=9, color="0.35")
    return figure


def _compared(decoding: Sequence[BenchRow]) -> list[BenchRow]:
    """All of them, or where contexts or batches vary those of one number of threads and of tokens."""
    alike = [row for row in decoding if (row.threads, row.tokens) == (decoding[0].threads, decoding[0].tokens)]
    return alike if _varies(alike) else list(decoding)


def _varies(rows: Sequence[BenchRow]) -> bool:
    return len({row.depth for row in rows}) > 1 or len({row.batch for row in rows}) > 1


def _left_out(decoding: Sequence[BenchRow], chosen: Sequence[BenchRow]) -> str:
    """What of decoding the panels do not show."""
    drawn = {(row.threads, row.tokens) for row in chosen}
    left: dict[str, list[str]] = {}
    for row in decoding:
        if (row.threads, row.tokens) not in drawn:
            left.setdefault(_threads(row.threads), []).append(row.test.partition(" @ ")[0])
    return "not drawn: " + "; ".join(f"{', '.join(dict.fromkeys(t))} on {n}" for n, t in left.items()) if left else ""


def _threads(count: int | None) -> str:
    return "all threads" if count is None else f"{count} thread{'' if count == 1 else 's'}"


def _lines(rows: Sequence[BenchRow], chosen: Sequence[BenchRow], kind: Kind) -> Iterator[Line]:
    """The rows of panels of one kind of test."""
    scales = [quantity.scaled(rows) for quantity in QUANTITIES]
    if kind == "prefill" or not _varies(chosen):
        bars = [row for row in rows if row.kind == kind]
        title = "Prompts" if kind == "prefill" else "Decoding"
        if bars:
            if kind == "prefill":
                scales[0] = ("to the first token (median), ms", 1.0)
            yield title, 1.2 + _BAR_HEIGHT * len(bars), partial(_bars, rows=bars, scales=scales)
        return
    depths, batches = sorted({row.depth for row in chosen}), sorted({row.batch for row in chosen})
    first = chosen[0]
    title = f"Decoding, {first.tokens:,} token{'' if first.tokens == 1 else 's'} on {_threads(first.threads)}"
    if len(depths) > 1:
        curves = partial(_curves, label="tokens of context", x=lambda row: row.depth, scales=scales)
        shown = [row for row in chosen if row.batch == batches[0]]
        yield f"{title}, batch {batches[0]}", _HEIGHT, partial(curves, rows=shown)
    if len(batches) > 1:
        # The longest context with the most rows: where memory did not suffice there are fewer.
        depth = max(depths, key=lambda depth: (sum(row.depth == depth for row in chosen), depth))
        curves = partial(_curves, label="sequences at once", x=lambda row: row.batch, scales=scales)
        shown = [row for row in chosen if row.depth == depth]
        yield f"{title}, {depth:,} tokens of context", _HEIGHT, partial(curves, rows=shown)


def _curves(
    axes: Sequence[Axes],
    rows: Sequence[BenchRow],
    x: Callable[[BenchRow], int],
    label: str,
    scales: Sequence[tuple[str, float]],
) -> None:
    names = list(dict.fromkeys(row.implementation for row in rows))
    ticks = sorted({x(row) for row in rows})
    for panel, quantity, (text, size) in zip(axes, QUANTITIES, scales, strict=True):
        for name, colour in zip(names, COLOURS, strict=False):
            points = sorted((row for row in rows if row.implementation == name), key=x)
            values = [(x(row), value / size, quantity.error(row)) for row in points if (value := quantity.value(row))]
            _curve(panel, values, name, colour, above=name == names[0])
        _decorate(panel, label, text)
        panel.set_xscale("symlog", base=2, linthresh=next((tick for tick in ticks if tick), 1))
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45 if len(ticks) > 5 else 0)
        panel.minorticks_off()
        panel.margins(x=0.15, y=0.12)
        panel.set_ylim(bottom=0)
    if len(names) > 1:
        axes[0].legend(frameon=False)


def _curve(
    panel: Axes, points: Sequence[tuple[int, float, float | None]], name: str, colour: str, *, above: bool
) -> None:
    """A line through points with their errors, the last value written beside it."""
    if not points:
        return
    places, values, errors = zip(*points, strict=True)
    bars = [error or 0.0 for error in errors]
    lines = panel.errorbar(places, values, yerr=bars, color=colour, label=name, marker="o", markersize=4, capsize=2)
    lines[0].set_zorder(4 if above else 3)
    end, offset = (places[-1], values[-1]), (5, -3)
    panel.annotate(_number(values[-1]), end, offset, textcoords="offset points", color=colour, fontsize=8)


def _bars(axes: Sequence[Axes], rows: Sequence[BenchRow], scales: Sequence[tuple[str, float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    several = len({row.batch for row in rows}) > 1
    labels = [
        f"{row.implementation} {row.test}\n{f'batch {row.batch}, ' if several else ''}{_threads(row.threads)}"
        for row in rows
    ]
    names = list(dict.fromkeys(row.implementation for row in rows))
    colours = [COLOURS[names.index(row.implementation)] for row in rows]
    for panel, quantity, (text, size) in zip(axes, QUANTITIES, scales, strict=True):
        values = [(quantity.value(row) or 0.0) / size for row in rows]
        bars = panel.barh(range(len(rows)), values, color=colours, xerr=[quantity.error(row) or 0.0 for row in rows])
        panel.bar_label(bars, labels=[_number(value) for value in values], padding=6, fontsize=8)
        panel.set_yticks(range(len(rows)), labels if panel is axes[0] else [""] * len(rows), fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.25)
        panel.set_xlabel(text)
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.xaxis.set_major_formatter("{x:,.12g}")
        panel.spines[["top", "right"]].set_visible(False)


def _positions(axes: Sequence[Axes], flat: Flatness) -> None:
    """Latency and throughput; the errors of logits have no unit of these columns and are written beside them."""
    latency, throughput, *rest = axes
    places = [p.position for p in flat.positions]
    ms, spread = ([getattr(p, name) for p in flat.positions] for name in ("ms_per_token", "ms_per_token_std"))
    rates = [1e3 / value for value in ms]
    errors = [rate * error / value for rate, error, value in zip(rates, spread, ms, strict=True)]
    for panel, values, bars, text in (
        (latency, ms, spread, "a step (median), ms"),
        (throughput, rates, errors, "throughput, tokens/s"),
    ):
        panel.errorbar(places, values, yerr=bars, color=COLOURS[0], marker="o", markersize=4, capsize=2)
        panel.set_ylim(0, 1.2 * max(values))
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:,.0f}")
        _decorate(panel, "position", text)
    for unused in rest:
        unused.set_axis_off()
    said = [
        f"{flat.difference:+.3f} ms over the range ({flat.difference_low:+.3f} to {flat.difference_high:+.3f}, 95%)",
        *(
            f"at {p.position:,} a logit differs from float64 by at most {p.max_abs:.1e}"
            for p in flat.positions
            if p.max_abs is not None
        ),
    ]
    rest[0].text(0, 0.95, "\n".join(said), va="top", fontsize=9, linespacing=1.6)


def _number(value: float) -> str:
    """Three digits, and no powers of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _decorate(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=True, color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
