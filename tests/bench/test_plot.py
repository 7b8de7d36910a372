"""Pictures show the figures of the rows and can be read without them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from retnet_tools.bench.options import Case
from retnet_tools.bench.plot import draw, write_bench_plot
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


def test_the_title_is_the_model_and_every_panel_says_what_it_shows() -> None:
    figure = draw(report(GRID, flat=True))
    assert figure.get_suptitle() == "RetNet 1.3b: 1,000 million parameters, float32, int8 in 128s"
    assert figure.get_supxlabel() == "cpu; Some processor, 2 cores"
    assert [axes.get_title(loc="left") for axes in figure.axes[::4]] == [
        "Decoding, 8 tokens on 2 threads, batch 1",
        "Decoding, 8 tokens on 2 threads, 2,048 tokens of context",
        "Decoding far out, one sequence",
    ]
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels[::4] == ["tokens of context", "sequences at once", "position"]
    assert figure.axes[0].get_legend() is not None
    assert all(axes.get_ylim()[0] == 0 for axes in figure.axes[:10])


def test_a_column_has_one_unit() -> None:
    prompts = [row("retnet", Case("prefill", tokens, 0, 1)) for tokens in (64, 512)]
    figure = draw(report([*GRID, *prompts], flat=True))
    columns = [figure.axes[column::4] for column in range(4)]
    for panels, unit in zip(columns, ("ms", "tokens/s", "MB", "kB"), strict=True):
        bars, *curves = [panel for panel in panels if panel.axison]
        assert bars.get_xlabel().endswith(f", {unit}")
        assert all(panel.get_ylabel().endswith(f", {unit}") for panel in curves)
    assert [len(panels[0].patches) for panels in columns] == [2] * 4
    assert "to the first token" in columns[0][0].get_xlabel()
    assert "a step" in columns[0][1].get_ylabel()


def test_positions_are_drawn_with_their_errors() -> None:
    figure = draw(report([], flat=True))
    assert figure.axes[0].containers[0].lines[0].get_ydata().tolist() == [10.03, 10.04, 10.05, 10.06]
    rates = [1e3 / ms for ms in (10.03, 10.04, 10.05, 10.06)]
    assert figure.axes[1].containers[0].lines[0].get_ydata().tolist() == pytest.approx(rates)
    said = figure.axes[2].texts[0].get_text()
    assert "+0.030 ms over the range (-0.030 to +0.090, 95%)" in said
    assert "at 1,000 a logit differs from float64 by at most 3.0e-05" in said
    assert "at 1,000,000 a logit differs from float64 by at most 6.0e-05" in said


def test_prompts_and_decoding_are_bars_in_panels_apart() -> None:
    rows = [row("retnet", Case("prefill", 64, 0, 1)), row("retnet", Case("decode", 8, 0, 1))]
    figure = draw(report(rows))
    prompts, decoding = figure.axes[:4], figure.axes[4:]
    assert [prompts[0].get_title(loc="left"), decoding[0].get_title(loc="left")] == ["Prompts", "Decoding"]
    for panels, found in ((prompts, rows[0]), (decoding, rows[1])):
        assert [bar.get_width() for bar in panels[1].patches] == [found.tokens_per_second]
        assert [found.test in text.get_text() for text in panels[0].get_yticklabels()] == [True]
    assert prompts[0].patches[0].get_width() == rows[0].ms_to_first_token
    assert decoding[0].patches[0].get_width() == rows[1].ms_per_token_p50


@pytest.mark.parametrize("name", ["a.png", "b.svg"])
def test_a_file_is_written_whole(name: str, tmp_path: Path) -> None:
    write_bench_plot(report(GRID, flat=True), tmp_path / name, force=False)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).stat().st_size > 10_000


def test_what_is_not_drawn_is_named() -> None:
    rows = [*GRID, row("retnet", Case("prefill", 64, 0, 1)), row("retnet", Case("decode", 16, 0, 1))]
    rows += [replace(GRID[0], threads=4)]
    figure = draw(report(rows))
    assert figure.get_supxlabel().endswith("\nnot drawn: tg16 on 2 threads; tg8 on 4 threads")
    # The lines are those of one number of tokens.
    assert curve(figure.axes[4], "retnet")[0] == [0, 512, 2048]


def test_bars_show_all_tests_and_leave_nothing_out() -> None:
    rows = [row("retnet", Case("prefill", 64, 0, batch)) for batch in (1, 4)]
    rows += [replace(rows[0], threads=4)]
    figure = draw(report(rows))
    assert len(figure.axes[1].patches) == 3
    assert len({label.get_text() for label in figure.axes[0].get_yticklabels()}) == 3
    assert "not drawn" not in figure.get_supxlabel()


def test_nothing_to_draw_is_one_line() -> None:
    with pytest.raises(RetNetToolsError, match="without rows"):
        draw(report([]))
