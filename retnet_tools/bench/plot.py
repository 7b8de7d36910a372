"""A picture of a benchmark: latency, throughput and memory against context and batch. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retnet_tools.bench.results import BenchReport, BenchRow, Flatness
from retnet_tools.bench.rows import memory_in_use
from retnet_tools.errors import RetNetToolsError
from retnet_tools.plotting import COLOURS, check_plot, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 4.3, 3.7


@dataclass(frozen=True)
class Quantity:
    """What a panel shows.

    Attributes:
        value: of a row; None where it is not known.
        error: its standard deviation, where there is one.
        in_bytes: whether the label is followed by the unit that fits: kB, MB or GB.
    """

    label: str
    value: Callable[[BenchRow], float | None]
    error: Callable[[BenchRow], float | None] = lambda row: None
    in_bytes: bool = False

    def scaled(self, rows: Sequence[BenchRow]) -> tuple[str, float]:
        """The label with its unit, and what to divide values by."""
        if not self.in_bytes:
            return self.label, 1.0
        largest = max((self.value(row) or 0.0 for row in rows), default=0.0)
        unit, size = next((u for u in (("GB", 1e9), ("MB", 1e6)) if largest >= u[1]), ("kB", 1e3))
        return f"{self.label}, {unit}", size


QUANTITIES = (
    Quantity("latency of a step, ms (median)", lambda row: row.ms_per_token_p50),
    Quantity("throughput, tokens/s", lambda row: row.tokens_per_second, lambda row: row.tokens_per_second_std),
    Quantity("memory of the process, weights included", memory_in_use, in_bytes=True),
    Quantity("state or cache of a sequence", lambda row: row.state_bytes_per_sequence, in_bytes=True),
)


def write_plot(report: BenchReport, path: Path, *, force: bool) -> None:
    """Draw a report; the file appears whole or not at all.

    Raises:
        RetNetToolsError, UsageError, OutputError: as `retnet_tools.plotting.save_figure`.
    """
    check_plot(path, force=force)
    save_figure(draw(report), path, force=force)


def draw(report: BenchReport) -> Figure:
    """The figure: a row of panels for what decoding does with the context, one for the batch, one for positions.

    Without several contexts or batches, bars compare the tests. What the panels do not show is named in the title.

    Raises:
        RetNetToolsError: nothing was measured that could be drawn.
    """
    from matplotlib.figure import Figure

    if not report.rows and report.flat is None:
        raise RetNetToolsError("--plot of a benchmark without rows", action="measure something that memory allows")
    chosen = _chosen(report.rows)
    rows = list(_panel_rows(report, chosen))
    figure = Figure(figsize=(_WIDTH * len(QUANTITIES), _HEIGHT * len(rows) + 0.8), layout="constrained")
    axes = np.reshape(figure.subplots(len(rows), len(QUANTITIES), squeeze=False), (len(rows), -1))
    for drawer, line in zip(rows, axes, strict=True):
        drawer(list(line))
    figure.suptitle(_title(report, chosen), fontsize=11)
    return figure


def _chosen(rows: Sequence[BenchRow]) -> list[BenchRow]:
    """What the panels compare: everything, or where contexts or batches vary one number of threads and of tokens."""
    decoding = _decoding(rows)
    if not _varies(decoding):
        return list(rows)
    return [row for row in decoding if row.tokens == decoding[0].tokens]


def _decoding(rows: Sequence[BenchRow]) -> list[BenchRow]:
    return [row for row in rows if row.kind == "decode" and row.threads == rows[0].threads]


def _varies(rows: Sequence[BenchRow]) -> bool:
    return len({row.depth for row in rows}) > 1 or len({row.batch for row in rows}) > 1


def _title(report: BenchReport, chosen: Sequence[BenchRow]) -> str:
    model, machine = report.model, report.machine
    types = f"{model.dtype}, {model.quantization}" if model.quantization else model.dtype
    name = f"RetNet {model.name}: {model.parameters / 1e6:,.0f} million parameters, {types}"
    where = f"{report.device_name or report.device}, {machine.processor}, {machine.cores} cores"
    return "\n".join(filter(None, (name, where, _drawn(report.rows, chosen))))


def _drawn(rows: Sequence[BenchRow], chosen: Sequence[BenchRow]) -> str:
    """What is drawn, and what of the rows is not."""
    if len({row.threads for row in chosen}) != 1:
        return ""
    kept = {(row.threads, _test(row)) for row in chosen}
    left = dict.fromkeys((row.threads, _test(row)) for row in rows if (row.threads, _test(row)) not in kept)
    drawn = f"drawn: {', '.join(dict.fromkeys(map(_test, chosen)))} on {_threads(chosen[0].threads)}"
    if min(len({row.depth for row in chosen}), len({row.batch for row in chosen})) > 1:
        drawn += ", contexts at one batch and batches at one context"
    if not left:
        return drawn
    by_threads: dict[int | None, list[str]] = {}
    for threads, test in left:
        by_threads.setdefault(threads, []).append(test)
    return f"{drawn}; left out: " + "; ".join(f"{', '.join(t)} on {_threads(n)}" for n, t in by_threads.items())


def _test(row: BenchRow) -> str:
    """The name of a test without its depth."""
    return row.test.partition(" @ ")[0]


def _threads(count: int | None) -> str:
    return "all threads" if count is None else f"{count} thread{'' if count == 1 else 's'}"


def _panel_rows(report: BenchReport, chosen: Sequence[BenchRow]) -> Iterator[Callable[[list[Axes]], None]]:
    depths, batches = sorted({row.depth for row in chosen}), sorted({row.batch for row in chosen})
    curves = _varies(_decoding(report.rows))
    if curves and len(depths) > 1:
        label = f"tokens of context (batch {batches[0]})"
        rows = [row for row in chosen if row.batch == batches[0]]
        yield partial(_curves, rows=rows, x=lambda row: row.depth, label=label)
    if curves and len(batches) > 1:
        # The longest context with the most rows: where memory did not suffice there are fewer.
        depth = max(depths, key=lambda depth: (sum(row.depth == depth for row in chosen), depth))
        label = f"sequences at once ({depth:,} tokens of context)"
        rows = [row for row in chosen if row.depth == depth]
        yield partial(_curves, rows=rows, x=lambda row: row.batch, label=label)
    if chosen and not curves:
        yield partial(_bars, rows=chosen)
    if report.flat is not None:
        yield partial(_positions, flat=report.flat)


def _curves(axes: list[Axes], rows: Sequence[BenchRow], x: Callable[[BenchRow], int], label: str) -> None:
    names = list(dict.fromkeys(row.implementation for row in rows))
    ticks = sorted({x(row) for row in rows})
    for panel, quantity in zip(axes, QUANTITIES, strict=True):
        text, size = quantity.scaled(rows)
        for name, colour in zip(names, COLOURS, strict=False):
            points = sorted((row for row in rows if row.implementation == name), key=x)
            values = [(x(row), value / size, quantity.error(row)) for row in points if (value := quantity.value(row))]
            _curve(panel, values, name, colour, above=name == names[0])
        _decorate(panel, text)
        panel.set_xlabel(label)
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


def _bars(axes: list[Axes], rows: Sequence[BenchRow]) -> None:
    several = len({row.batch for row in rows}) > 1
    batches = [f", batch {row.batch}" if several else "" for row in rows]
    labels = [
        f"{r.implementation}\n{r.test}{batch}, {_threads(r.threads)}" for r, batch in zip(rows, batches, strict=True)
    ]
    names = list(dict.fromkeys(row.implementation for row in rows))
    colours = [COLOURS[names.index(row.implementation)] for row in rows]
    for panel, quantity in zip(axes, QUANTITIES, strict=True):
        text, size = quantity.scaled(rows)
        values = [(quantity.value(row) or 0.0) / size for row in rows]
        bars = panel.barh(range(len(rows)), values, color=colours, xerr=[quantity.error(row) or 0.0 for row in rows])
        panel.bar_label(bars, labels=[_number(value) for value in values], padding=6, fontsize=8)
        panel.set_yticks(range(len(rows)), labels if panel is axes[0] else [""] * len(rows), fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.25)
        panel.set_xlabel(text)
        panel.spines[["top", "right"]].set_visible(False)


def _positions(axes: list[Axes], flat: Flatness) -> None:
    panel, errors, *rest = axes
    places = [p.position for p in flat.positions]
    panel.errorbar(
        places,
        [p.ms_per_token for p in flat.positions],
        yerr=[p.ms_per_token_std for p in flat.positions],
        color=COLOURS[0],
        marker="o",
        markersize=4,
        capsize=2,
    )
    panel.set_title(
        f"{flat.difference:+.3f} ms over the range\n({flat.difference_low:+.3f} to {flat.difference_high:+.3f}, 95%)",
        fontsize=8,
    )
    panel.set_ylim(0, 1.2 * max(p.ms_per_token for p in flat.positions))
    _decorate(panel, "latency of a step, ms")
    known = [(p.position, p.max_abs) for p in flat.positions if p.max_abs is not None]
    errors.plot([at for at, _ in known], [error for _, error in known], color=COLOURS[0], marker="o", markersize=4)
    _decorate(errors, "largest difference of a logit from float64")
    errors.set_ylim(bottom=0)
    for axis in (panel, errors):
        axis.set_xscale("log")
        axis.set_xlabel("position")
    for unused in rest:
        unused.set_axis_off()


def _number(value: float) -> str:
    """Three digits, and no powers of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _decorate(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(visible=True, color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
