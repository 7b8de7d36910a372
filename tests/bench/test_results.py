"""A document is read back as it was, and names what was really in use."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import metadata

import numpy as np
import onnxruntime
import pytest

import retnet_tools
from retnet_tools.bench.results import BenchRow, StepProfile, benchmark_document
from retnet_tools.fields import from_json
from tests.bench.reports import GRID, report


def test_the_document_is_json_and_its_rows_are_read_back() -> None:
    document = json.loads(json.dumps(benchmark_document(report(GRID, flat=True, profile=True))))
    assert document["schema_version"] == 3
    assert [from_json(BenchRow, data) for data in document["rows"]] == GRID
    assert document["skipped"][0]["reason"].startswith("it needs")
    assert document["flat"]["positions"][3]["position"] == 1_000_000
    assert from_json(StepProfile, document["profile"]) == report([], profile=True).profile
    assert document["libraries"]["numpy"] == np.__version__
    assert document["options"]["repetitions"] == 3
    assert document["options"]["tokens"] == [128]
    assert document["quick"] is False


def test_what_was_measured_is_named_as_it_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another onnxruntime may be installed than the one that comes first on the path, and this package not at all."""
    from onnxruntime.capi import build_and_package_info

    def version(name: str) -> str:
        if name == "retnet-tools":
            raise metadata.PackageNotFoundError(name)
        return "installed"

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(build_and_package_info, "package_name", "onnxruntime-somewhere")
    document = benchmark_document(report([]))
    assert document["retnet_tools"] == retnet_tools.__version__
    names = {name: text for name, text in document["libraries"].items() if name.startswith("onnxruntime")}
    assert names == {"onnxruntime-somewhere": onnxruntime.__version__}


def test_what_of_each_repetition_is_kept_gives_the_shares_again() -> None:
    for row in json.loads(json.dumps([asdict(row) for row in GRID])):
        shares = 1e3 * row["bytes_per_token"] * row["batch"] / np.array(row["ms_medians"]) / np.array(row["bandwidths"])
        assert np.median(shares) == pytest.approx(row["floor_share"])
        assert np.mean(row["repetitions"]) == pytest.approx(row["tokens_per_second"])
