"""What a process takes to open an export: in turns with an older tree, what deviates made again, and its table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
FIGURES = {"opening_seconds": 1.0, "first_token_seconds": 2.0, "prompt_tokens_per_second": 100.0, "ms_per_token": 30.0}


@pytest.fixture
def opening(scripts) -> ModuleType:
    return scripts("opening")


def test_rounds_that_deviate_are_those_off_by_a_tenth(opening: ModuleType) -> None:
    def rounds(name: str, *values: float) -> list[dict[str, dict[str, float]]]:
        return [{"now": FIGURES | {name: value}, "before": FIGURES} for value in values]

    assert opening.deviating(rounds("ms_per_token", 30, 32.9, 27.1)) == []
    assert opening.deviating(rounds("ms_per_token", 30, 33.1, 26.9)) == [1, 2]
    assert opening.deviating(rounds("opening_seconds", 1, 1, 1.2)) == [2]
    # Two hundredths of a second are noise of the clock and of the start of a process.
    assert opening.deviating(rounds("opening_seconds", 0.05, 0.05, 0.07)) == []


def side(opening: ModuleType, name: str, folder: Path) -> object:
    return opening.Side(name, ROOT, folder, folder / "cache", "int8")


def test_trees_take_turns_and_a_round_is_made_again_by_both(
    opening: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[str] = []
    slow = {3: 60.0}

    class Process:
        def __init__(self, side: object, request: object) -> None: ...

        def __enter__(self) -> dict[str, float]:
            return {"weight_bytes": 5, "seconds": 1.0}

        def __exit__(self, *_: object) -> None: ...

    def once(self: object, side: object) -> dict[str, float]:
        calls.append(side.name)
        return FIGURES | {"ms_per_token": slow.get(len(calls), 30.0)}

    for name, found in (("_first", {"a": 1}), ("_second", {"b": 2})):
        monkeypatch.setattr(opening.Measurement, name, lambda self, side, found=found: found)
    monkeypatch.setattr(opening.Measurement, "_once", once)
    monkeypatch.setattr(opening, "Process", Process)
    arguments = argparse.Namespace(threads=1, prompt=8, steps=2)
    sides = [side(opening, name, tmp_path) for name in ("now", "before")]
    now, before = opening.Measurement(arguments, "base", sides).rows(3, scored=0)
    assert calls == ["now", "before", "before", "now", "now", "before", "before", "now"]
    assert (now["tree"], before["tree"]) == ("now", "before")
    assert (now["made_again"], now["deviating"], now["ms_per_token"]) == ([1], [], 30)
    assert before["rounds"]["ms_per_token"] == [30, 30, 30]
    assert (before["a"], before["b"], before["weight_bytes"]) == (1, 2, 5)


def test_its_table_has_both_trees_in_a_cell(scripts) -> None:
    row = FIGURES | {"size": "1.3b", "weights": "int8", "tree": "now", "made_again": [1], "deviating": []}
    row |= {"reading_seconds": 0.41, "opening_first_seconds": 3.0, "scoring_one_row": 210.0, "scoring_rows": 260.0}
    row |= {"peak_resident_bytes": 2e9, "anonymous_bytes": 1e8, "second_own_bytes": 2e8}
    before = row | {"tree": "before", "opening_seconds": 2.5, "scoring_one_row": 30.0}
    large = {name: value for name, value in row.items() if not name.startswith("scoring")} | {"size": "6.7b"}
    document = {
        "command": "python benchmarks/opening.py --tree ../older",
        "recorded": "2026-11-24",
        "machine": {"processor": "Some processor", "cores": 2, "memory_bytes": None},
        **{"threads": 2, "prompt": 256, "row": 128, "before": "bb4d843ea1", "results": [row, before]},
    }
    text = scripts("docs_script_tables").opening(document, document | {"results": [large]})
    assert "| 1.3b int8 (again) | 0.41 | 3.00 | 2.50 / 1.00 | 2.00 / 2.00 | 100 / 100 | 30 / 30 | 30 / 210 |" in text
    assert "| 6.7b int8 (again) | 0.41 | 3.00 | 1.00 | 2.00 | 100 | 30 | - | - | 2.00 | 0.10 | 0.20 |" in text
    assert "Pairs are of commit bb4d843 / now, in turns. 2 threads" in text
    assert len(text.splitlines()[0].split("|")) == len(text.splitlines()[2].split("|"))


@pytest.mark.slow
def test_it_is_measured_to_the_end(scripts, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "opening.py"), "--quick", "--kinds", "int8"]
    command += ["-t", "1", "--tree", str(ROOT), "--folder", str(tmp_path), "-o", str(output)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
    rows = json.loads(output.read_text())["results"]
    assert [row["tree"] for row in rows] == ["now", "before"]
    for row in rows:
        assert 0 < row["opening_seconds"] < row["first_token_seconds"]
        assert min(row["scoring_one_row"], row["scoring_rows"], row["prompt_tokens_per_second"]) > 0
        assert 0 < row["anonymous_bytes"] < row["resident_bytes"] <= row["peak_resident_bytes"]
        # It packs nothing anew and shares the weights.
        assert row["second_own_bytes"] < row["resident_bytes"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert "| base int8" in scripts("docs_script_tables").opening(json.loads(output.read_text()))


def test_a_peak_is_no_less_than_what_is_resident(scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    opening_process = scripts("opening_process")
    # As the system counts them: the peak in batches of pages.
    counted = {"VmHWM": 4096, "Rss": 8192}
    monkeypatch.setattr(opening_process, "_kilobytes", lambda file, name: counted.get(name, 0))
    assert opening_process.memory()["peak_resident_bytes"] == 8192
    counted["VmHWM"] = 12288
    assert opening_process.memory()["peak_resident_bytes"] == 12288
