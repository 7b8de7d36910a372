"""Plots show the figures of the report, and appear whole or not at all."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from retnet_tools.errors import OutputError, RetNetToolsError, UsageError
from retnet_tools.evaluate.perplexity import PerplexityReport, measure_perplexity
from retnet_tools.evaluate.scored_text import ScoredText
from retnet_tools.evaluate.scoring import Windows
from retnet_tools.plotting import check_plot
from retnet_tools.reports.perplexity_plot import draw, write_plot
from tests.sources import MarkovLogits

TEXT = ScoredText(np.random.default_rng(0).integers(0, 30, 800), None)


def report(*, against: bool = True, noise: float = 0.1, positions: bool = True) -> PerplexityReport:
    model, baseline = MarkovLogits(30, noise=lambda place: noise * (1 + place)), MarkovLogits(30, name="base")
    return measure_perplexity(model, TEXT, Windows(32), baseline=baseline if against else None, positions=positions)


def curve(axes, label: str) -> tuple[list[float], list[float]]:
    (line,) = [c for c in axes.containers if c.get_label() == label]
    return line.lines[0].get_xdata().tolist(), line.lines[0].get_ydata().tolist()


def test_the_panels_show_nll_and_kld_of_every_bin() -> None:
    result = report()
    figure = draw(result)
    nll, kld = figure.axes
    bins = result.by_position.bins
    middles = [(b.first * b.last) ** 0.5 for b in bins]
    assert curve(nll, "model") == (pytest.approx(middles), [b.nll.value for b in bins])
    assert curve(nll, "baseline") == (pytest.approx(middles), [b.baseline_nll.value for b in bins])
    assert curve(kld, "by context") == (pytest.approx(middles), [b.kld.value for b in bins])
    assert kld.get_yscale() == "log"
    assert "the error grows" in kld.get_title()
    assert all("nats" in axes.get_ylabel() and axes.get_xlabel() == "tokens of context" for axes in figure.axes)


def test_without_a_baseline_there_is_one_panel_and_a_divergence_of_zero_is_drawn_linearly() -> None:
    assert len(draw(report(against=False)).axes) == 1
    assert draw(report(noise=0.0)).axes[1].get_yscale() == "linear"


@pytest.mark.parametrize("name", ["a.png", "b.svg", "c.PDF"])
def test_files_are_of_the_type_that_their_name_says(name: str, tmp_path: Path) -> None:
    write_plot(report(), tmp_path / name, force=False)
    data = (tmp_path / name).read_bytes()
    if name.endswith("svg"):
        assert ElementTree.fromstring(data).tag.endswith("svg")
    else:
        assert data.startswith({"a.png": b"\x89PNG", "c.PDF": b"%PDF"}[name])
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"exists already.*--force"):
        check_plot(path, force=False)
    write_plot(report(), path, force=True)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    from matplotlib.figure import Figure

    def full(self, file, **options) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OutputError, match="the disk is full"):
        write_plot(report(), tmp_path / "a.png", force=False)
    assert list(tmp_path.iterdir()) == []


def test_other_types_and_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a name ending in \.png"):
        check_plot(tmp_path / "a.gif", force=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file is a file; expected a folder"):
        check_plot(tmp_path / "file" / "a.png", force=False)


def test_a_missing_matplotlib_is_one_line_that_says_what_to_install(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RetNetToolsError, match=r"^--plot needs matplotlib; pip install 'retnet-tools\[plot\]'$"):
        check_plot(tmp_path / "a.png", force=False)


def test_a_report_without_positions_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="by position"):
        draw(report(positions=False))
