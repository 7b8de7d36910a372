"""`retnet-tools bench`: real numbers on the shipped model, and the provider that was asked for or none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.exports import export
from tests.helpers import BASE, random_source

QUICK = ("-n", 8, "-r", 3, "-t", 1)


def test_the_shipped_checkpoint_is_measured(cli) -> None:
    result = cli("bench", "-b", "1,2", *QUICK, "--json")
    assert result.exit_code == 0
    assert "using the shipped one" in result.err
    document = json.loads(result.out)
    assert document["schema_version"] == 1
    assert [row["batch"] for row in document["rows"]] == [1, 2]
    for row in document["rows"]:
        assert row["test"] == "tg8"
        assert row["tokens_per_second"] > 0
        assert row["ms_per_token_p50"] <= row["ms_per_token_p99"]
        # Twice the float16 weights, as float32; position tables; states of 4 layers, 4 heads of 64 x 128.
        assert row["bytes_per_token"] > 2 * 8_391_680 + 2 * row["batch"] * 4 * 4 * 64 * 128 * 4
        assert row["state_bytes_per_sequence"] == 4 * 4 * 64 * 128 * 4


def test_rates_agree_with_times(tmp_path: Path, cli) -> None:
    folder = export(BASE, random_source(BASE, 1), tmp_path / "out")
    (row,) = json.loads(cli("bench", folder, "-b", 4, *QUICK, "--json").out)["rows"]
    assert row["tokens_per_second"] <= 4 * 1e3 / row["ms_per_token_p50"] * 2
    assert row["tokens_per_second"] >= 4 * 1e3 / row["ms_per_token_p99"] / 2


def test_the_table_has_a_line_for_each_row(tmp_path: Path, cli) -> None:
    folder = export(BASE, random_source(BASE, 1), tmp_path / "out", ops="standard")
    lines = cli("bench", folder, "-b", "1,3", *QUICK).out.splitlines()
    assert len(lines) == 4
    assert "standard" in lines[0]


def test_cuda_where_there_is_none_ends_with_exit_code_4_before_any_work(monkeypatch, cli) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    result = cli("bench", "--device", "cuda")
    assert (result.exit_code, result.out) == (4, "")
    assert "no CUDA provider" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [("-b", "0"), ("-b", "1,x"), ("-t", "100000"), ("-r", 0), ("--device", "tpu")])
def test_wrong_options_are_refused(arguments: tuple[object, ...], cli) -> None:
    result = cli("bench", *arguments)
    assert (result.exit_code, result.out) == (2, "")
    assert result.err.count("\n") == 1
