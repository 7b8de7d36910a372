"""A picture of a perplexity report: figures by the tokens of context. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retnet_tools.evaluate.estimates import Estimate
from retnet_tools.evaluate.perplexity import PerplexityReport
from retnet_tools.evaluate.positions import ByPosition
from retnet_tools.plotting import COLOURS, check_plot, save_figure
from retnet_tools.reports.perplexity_text import estimate_text, trend_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MODEL, _BASELINE, *_ = COLOURS
_LOG_SCALE_FROM = 5
"""How many times as high as the lowest the highest has to be for a logarithmic axis."""
_WIDTH, _HEIGHT = 5.6, 4.2


def write_plot(report: PerplexityReport, path: Path, *, force: bool) -> None:
    """Draw NLL, and against a baseline KLD, over the context; the file appears whole or not at all.

    Raises:
        ValueError: a report without figures by position.
        RetNetToolsError, UsageError, OutputError: as `retnet_tools.plotting.save_figure`.
    """
    check_plot(path, force=force)
    save_figure(draw(report), path, force=force)


def draw(report: PerplexityReport) -> Figure:
    """The figure: a panel for NLL, and one for KLD where there is a baseline.

    Raises:
        ValueError: a report without figures by position.
    """
    from matplotlib.figure import Figure

    positions = report.by_position
    if positions is None:
        raise ValueError("the report has no figures by position")
    panels = 1 if positions.trend is None else 2
    figure = Figure(figsize=(_WIDTH * panels, _HEIGHT), layout="constrained")
    axes: list[Axes] = list(np.ravel(figure.subplots(1, panels)))
    against = "" if report.baseline_name is None else f"\nagainst {report.baseline_name}"
    figure.suptitle(f"{report.name}{against}: {report.scored_tokens:,} tokens scored", fontsize=10)
    _draw_nll(axes[0], positions)
    if panels == 2:
        _draw_kld(axes[1], positions, report)
    return figure


def _draw_nll(axes: Axes, positions: ByPosition) -> None:
    bins = positions.bins
    baseline = [bin.baseline_nll for bin in bins if bin.baseline_nll is not None]
    _line(axes, positions, [bin.nll for bin in bins], _MODEL, "model")
    axes.set_ylabel("mean NLL, nats a token")
    if baseline:
        _line(axes, positions, baseline, _BASELINE, "baseline", dashed=True)
        axes.legend(frameon=False)


def _draw_kld(axes: Axes, positions: ByPosition, report: PerplexityReport) -> None:
    kld = [bin.kld for bin in positions.bins if bin.kld is not None]
    _line(axes, positions, kld, _MODEL, "by context")
    if report.divergence is not None:
        overall = report.divergence.mean_kld
        axes.axhline(overall.value, color="0.5", linestyle=":", label=f"scored tokens: {estimate_text(overall)}")
    heights = [estimate.value for estimate in kld if estimate.value > 0]
    if heights and max(heights) > _LOG_SCALE_FROM * min(heights):
        axes.set_yscale("log", nonpositive="mask")
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel("mean KLD, nats a token")
    axes.legend(frameon=False)
    if positions.trend is not None:
        axes.set_title(trend_text(positions.trend).replace(" (", "\n("), fontsize=8, pad=14)


def _line(
    axes: Axes, positions: ByPosition, values: Sequence[Estimate], colour: str, label: str, *, dashed: bool = False
) -> None:
    """A value for each bin with its standard error, at the geometric middle of the bin."""
    middle = [float(np.sqrt(bin.first * bin.last)) for bin in positions.bins]
    heights = [value.value for value in values]
    errors = np.nan_to_num([value.error for value in values])
    style = "--" if dashed else "-"
    axes.errorbar(
        middle, heights, yerr=errors, color=colour, label=label, linestyle=style, marker="o", markersize=4, capsize=2
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tokens of context")
    axes.grid(visible=True, color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
