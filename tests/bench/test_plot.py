"""Pictures show the figures of the rows and can be read without them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from retnet_tools.bench.options import Case
from retnet_tools.bench.plot import draw, write_plot
from retnet_tools.errors import RetNetToolsError
from tests.bench.reports import GRID, report, row


def curve(axes, label: str) -> tuple[list[float], list[float]]:
    (line,) = [c for c in axes.containers if c.get_label() == label]
    return line.lines[0].get_xdata().tolist(), line.lines[0].get_ydata().tolist()


def test_contexts_and_batches_have_a_row_of_panels_each() -> None:
    figure = draw(report(GRID, flat=True))
    assert len(figure.axes) == 12
    latency, throughput, memory, state = figure.axes[:4]
    for name in ("retnet", "transformer"):
        rows = [r for r in GRID if r.implementation == name and r.batch == 1]
        assert curve(latency, name) == ([0, 512, 2048], [r.ms_per_token_p50 for r in rows])
        assert curve(throughput, name)[1] == [r.tokens_per_second for r in rows]
        assert curve(memory, name)[1] == [pytest.approx(300.0)] * 3
        assert curve(state, name)[1] == [pytest.approx(r.state_bytes_per_sequence / 1e3) for r in rows]
    by_batch = [r for r in GRID if r.implementation == "transformer" and r.depth == 2048]
    assert curve(figure.axes[4], "transformer") == ([1, 8], [r.ms_per_token_p50 for r in by_batch])


def test_everything_is_labelled_with_its_unit() -> None:
    figure = draw(report(GRID, flat=True))
    labels = [axes.get_ylabel() for axes in figure.axes[:4]]
    assert [label.rpartition(", ")[2] for label in labels] == ["ms (median)", "tokens/s", "MB", "kB"]
    assert figure.axes[0].get_xlabel() == "tokens of context (batch 1)"
    assert figure.axes[4].get_xlabel() == "sequences at once (2,048 tokens of context)"
    assert figure.axes[0].get_legend() is not None
    assert "1.3b" in figure.get_suptitle()
    assert "Some processor" in figure.get_suptitle()
    assert all(axes.get_ylim()[0] == 0 for axes in figure.axes[:8])


def test_positions_are_drawn_with_their_errors() -> None:
    figure = draw(report([], flat=True))
    assert figure.axes[0].containers[0].lines[0].get_ydata().tolist() == [10.03, 10.04, 10.05, 10.06]
    assert "+0.030 ms" in figure.axes[0].get_title()
    assert figure.axes[1].lines[0].get_ydata().tolist() == pytest.approx([3e-5, 4e-5, 5e-5, 6e-5])


def test_single_tests_are_bars() -> None:
    rows = [row("retnet", Case("prefill", 64, 0, 1)), row("retnet", Case("decode", 8, 0, 1))]
    figure = draw(report(rows))
    assert [bar.get_width() for bar in figure.axes[1].patches] == [r.tokens_per_second for r in rows]
    assert ["pp64" in t.get_text() for t in figure.axes[0].get_yticklabels()] == [True, False]


@pytest.mark.parametrize("name", ["a.png", "b.svg"])
def test_a_file_is_written_whole(name: str, tmp_path: Path) -> None:
    write_plot(report(GRID, flat=True), tmp_path / name, force=False)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).stat().st_size > 10_000


def test_what_is_not_drawn_is_named() -> None:
    rows = [*GRID, row("retnet", Case("prefill", 64, 0, 1)), row("retnet", Case("decode", 16, 0, 1))]
    rows += [replace(GRID[0], threads=4)]
    title = draw(report(rows)).get_suptitle()
    assert "drawn: tg8 on 2 threads, contexts at one batch and batches at one context" in title
    assert "left out: pp64, tg16 on 2 threads; tg8 on 4 threads" in title
    # The lines are those of one number of tokens.
    assert curve(draw(report(rows)).axes[0], "retnet")[0] == [0, 512, 2048]


def test_bars_show_all_tests_and_leave_nothing_out() -> None:
    rows = [row("retnet", Case("prefill", 64, 0, batch)) for batch in (1, 4)]
    rows += [replace(rows[0], threads=4)]
    figure = draw(report(rows))
    assert len(figure.axes[1].patches) == 3
    assert len({label.get_text() for label in figure.axes[0].get_yticklabels()}) == 3
    assert "left out" not in figure.get_suptitle()


def test_nothing_to_draw_is_one_line() -> None:
    with pytest.raises(RetNetToolsError, match="without rows"):
        draw(report([]))
