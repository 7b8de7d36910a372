"""A picture of a benchmark: latency, throughput and memory against context and batch. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retnet_tools.reports.benchmark.results import BenchReport, BenchRow, Flatness
from retnet_tools.reports.plotting import COLOURS, check_plot, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 4.3, 3.7


@dataclass(frozen=True)
class Quantity:
    """What a panel shows.

    Attributes:
        value: of a row, in the unit of the label; None where it is not known.
        error: its standard deviation in the same unit, where there is one.
    """

    label: str
    value: Callable[[BenchRow], float | None]
    error: Callable[[BenchRow], float | None] = lambda row: None


def _gigabytes(count: float | None) -> float | None:
    return None if count is None else count / 1e9


def _memory(row: BenchRow) -> float | None:
    return _gigabytes(row.peak_resident_bytes if row.device_bytes is None else row.device_bytes)


QUANTITIES = (
    Quantity("latency, ms a step (median)", lambda row: row.ms_per_token_p50),
    Quantity("throughput, tokens/s", lambda row: row.tokens_per_second, lambda row: row.tokens_per_second_std),
    Quantity("memory in use with weights, GB", _memory),
    Quantity("state or cache, GB a sequence", lambda row: _gigabytes(row.state_bytes_per_sequence)),
)


def write_plot(report: BenchReport, path: Path, *, force: bool) -> None:
    """Draw a report; the file appears whole or not at all.

    Raises:
        RetNetToolsError, UsageError, OutputError: as `retnet_tools.reports.plotting.save_figure`.
    """
    check_plot(path, force=force)
    save_figure(draw(report), path, force=force)


def draw(report: BenchReport) -> Figure:
    """The figure: a row of panels for what decoding does with the context, one for the batch, one for positions.

    Without several contexts or batches, bars compare the tests.
    """
    from matplotlib.figure import Figure

    rows = list(_panel_rows(report))
    figure = Figure(figsize=(_WIDTH * len(QUANTITIES), _HEIGHT * len(rows) + 0.8), layout="constrained")
    axes = np.reshape(figure.subplots(len(rows), len(QUANTITIES), squeeze=False), (len(rows), -1))
    for drawer, line in zip(rows, axes, strict=True):
        drawer(list(line))
    figure.suptitle(_title(report), fontsize=11)
    return figure


def _title(report: BenchReport) -> str:
    model, machine = report.model, report.machine
    types = f"{model.dtype}, {model.quantization}" if model.quantization else model.dtype
    name = f"RetNet {model.name}: {model.parameters / 1e6:,.0f} million parameters, {types}"
    return f"{name}\n{report.device}, {machine.processor}, {machine.cores} cores"


def _panel_rows(report: BenchReport) -> Iterator[Callable[[list[Axes]], None]]:
    decoding = [row for row in report.rows if row.kind == "decode" and row.threads == report.rows[0].threads]
    depths, batches = sorted({row.depth for row in decoding}), sorted({row.batch for row in decoding})
    lines = []
    if len(depths) > 1:
        label = f"tokens of context (batch {batches[0]})"
        chosen = [row for row in decoding if row.batch == batches[0]]
        lines.append(partial(_curves, rows=chosen, x=lambda row: row.depth, label=label))
    if len(batches) > 1:
        # The longest context with the most rows: where memory did not suffice there are fewer.
        depth = max(depths, key=lambda depth: (sum(row.depth == depth for row in decoding), depth))
        label = f"sequences at once ({depth:,} tokens of context)"
        chosen = [row for row in decoding if row.depth == depth]
        lines.append(partial(_curves, rows=chosen, x=lambda row: row.batch, label=label))
    if report.rows and not lines:
        lines.append(partial(_bars, rows=report.rows))
    yield from lines
    if report.flat is not None:
        yield partial(_positions, flat=report.flat)


def _curves(axes: list[Axes], rows: Sequence[BenchRow], x: Callable[[BenchRow], int], label: str) -> None:
    names = list(dict.fromkeys(row.implementation for row in rows))
    ticks = sorted({x(row) for row in rows})
    for panel, quantity in zip(axes, QUANTITIES, strict=True):
        for name, colour in zip(names, COLOURS, strict=False):
            _curve(panel, sorted((row for row in rows if row.implementation == name), key=x), x, quantity, name, colour)
        _decorate(panel, quantity.label)
        panel.set_xlabel(label)
        panel.set_xscale("symlog" if ticks[0] == 0 else "log", base=2)
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45 if len(ticks) > 5 else 0)
        panel.minorticks_off()
        panel.margins(x=0.12, y=0.12)
        panel.set_ylim(bottom=0)
    if len(names) > 1:
        axes[0].legend(frameon=False)


def _curve(
    panel: Axes, rows: Sequence[BenchRow], x: Callable[[BenchRow], int], quantity: Quantity, name: str, colour: str
) -> None:
    """A line through the rows whose value is known, with the last value written beside it."""
    points = [(x(row), quantity.value(row), quantity.error(row) or 0.0) for row in rows]
    known = [(place, value, error) for place, value, error in points if value is not None]
    if not known:
        return
    places, values, errors = zip(*known, strict=True)
    panel.errorbar(places, values, yerr=errors, color=colour, label=name, marker="o", markersize=4, capsize=2)
    end, offset = (places[-1], values[-1]), (4, 4)
    panel.annotate(f"{values[-1]:.3g}", end, offset, textcoords="offset points", color=colour, fontsize=8)


def _bars(axes: list[Axes], rows: Sequence[BenchRow]) -> None:
    labels = [f"{row.test}\n{row.implementation}, {row.threads or 'all'} threads" for row in rows]
    names = list(dict.fromkeys(row.implementation for row in rows))
    colours = [COLOURS[names.index(row.implementation)] for row in rows]
    for panel, quantity in zip(axes, QUANTITIES, strict=True):
        values = [quantity.value(row) or 0.0 for row in rows]
        bars = panel.barh(range(len(rows)), values, color=colours, xerr=[quantity.error(row) or 0.0 for row in rows])
        panel.bar_label(bars, fmt="%.3g", padding=6, fontsize=8)
        panel.set_yticks(range(len(rows)), labels, fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.2)
        panel.set_xlabel(quantity.label)
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
    _decorate(panel, "latency, ms a step")
    known = [(p.position, p.max_abs) for p in flat.positions if p.max_abs is not None]
    errors.plot([at for at, _ in known], [error for _, error in known], color=COLOURS[0], marker="o", markersize=4)
    _decorate(errors, "largest difference of a logit from float64")
    errors.set_ylim(bottom=0)
    for axis in (panel, errors):
        axis.set_xscale("log")
        axis.set_xlabel("position")
    for unused in rest:
        unused.set_axis_off()


def _decorate(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(visible=True, color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
