"""What pictures share: where they may be written, and that they appear whole. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from retnet_tools.errors import RetNetToolsError, UsageError
from retnet_tools.staging import check_file, staged_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOT_TYPES = (".png", ".svg", ".pdf")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
"""Okabe and Ito's, which differ for colour-blind readers too."""
_DPI = 150


def check_plot(path: Path, *, force: bool) -> None:
    """Check, before anything is computed, that a plot can be drawn and written.

    Raises:
        RetNetToolsError: matplotlib is not installed.
        UsageError: another type of file, or one that exists.
        OutputError: it cannot be written there.
    """
    if path.suffix.lower() not in PLOT_TYPES:
        raise UsageError(f"--plot {path}", f"a name ending in {', '.join(PLOT_TYPES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise RetNetToolsError("--plot needs matplotlib", action="pip install 'retnet-tools[plot]'")
    check_file(path, force=force)


def save_figure(figure: Figure, path: Path, *, force: bool) -> None:
    """Write a figure; the file appears whole or not at all.

    Raises:
        RetNetToolsError, UsageError, OutputError: as `check_plot`, or the file cannot be written.
    """
    from matplotlib import rc_context

    check_plot(path, force=force)
    kind = path.suffix[1:].lower()
    # The same figure is the same file.
    with staged_file(path, force=force) as partial, rc_context({"svg.hashsalt": "retnet-tools"}):
        figure.savefig(partial, format=kind, dpi=_DPI, metadata={"Date": None} if kind == "svg" else None)
