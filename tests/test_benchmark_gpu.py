"""`make bench-gpu`: one command that runs everything and keeps what came of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_gpu import ROOT, FakeGpu, needs_fake_gpu

SCRIPT = "import runpy, sys; sys.argv[0] = 'gpu.py'; runpy.run_path('benchmarks/gpu.py', run_name='__main__')"
ROW = {
    "implementation": "retnet",
    "test": "tg128",
    "depth": 0,
    "batch": 8,
    "dtype": "float16",
    "quantization": None,
    "tokens_per_second": 1234.4,
    "ms_per_token_p50": 0.81,
    "floor_share": 0.823,
}


def write(folder: Path, name: str, rows: list[dict], **changes: object) -> None:
    command = ["python", "-m", "retnet_tools.cli.app", "bench", "--size", "6.7b"]
    document = {"command": command, "quick": False, "exit_code": 0, "result": {"rows": rows}, **changes}
    (folder / f"{name}.json").write_text(json.dumps(document))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_table_is_made_of_what_was_measured_in_full(tmp_path: Path) -> None:
    transformer = {**ROW, "implementation": "transformer", "depth": 8192, "floor_share": None, "quantization": "int8"}
    write(tmp_path, "a", [ROW, transformer])
    write(tmp_path, "b", [{**ROW, "batch": 99}], quick=True)
    write(tmp_path, "c", [{**ROW, "batch": 98}], exit_code=1)
    write(tmp_path, "d", [], result=None)
    lines = run("--results", tmp_path, "--table").stdout.splitlines()
    assert lines[2:] == [
        "| 6.7b, float16 | tg128 | 8 | 1234 | 0.81 | 82% |",
        "| 6.7b, int8, transformer | tg128 @ 8192 | 8 | 1234 | 0.81 |  |",
    ]


def test_a_step_that_does_not_exist_is_refused() -> None:
    result = run("--only", "doctor,nothing")
    assert result.returncode == 2
    assert "no step nothing" in result.stderr


@needs_fake_gpu
def test_steps_are_kept_with_their_machine_and_failures_are_said(tmp_path: Path) -> None:
    arguments = ("--quick", "--results", tmp_path, "--only", "doctor,retention", "--ort", tmp_path / "nowhere")
    result = FakeGpu().run(SCRIPT, *arguments, check=False)
    assert (result.returncode, result.stderr) == (1, "failed: doctor\n")
    doctor, retention = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("doctor", "retention"))
    # A GPU that computes nothing fails its self-test.
    assert (doctor["exit_code"], doctor["result"]["self_test_passed"]) == (1, False)
    assert retention["exit_code"] == 0
    assert retention["machine"]["devices"][0]["name"] == "Fake GPU 0"
    assert {row["form"] for row in retention["result"]["rows"]} == {"operator", "products", "split/2", "split/4"}
    assert all("us_captured" in row for row in retention["result"]["rows"])
    again = FakeGpu().run(SCRIPT, *arguments)
    assert again.stdout == "doctor: there already\nretention: there already\n"


def test_without_a_gpu_it_says_where_to_look(tmp_path: Path) -> None:
    from tests.cuda_device import why_not

    if why_not() is None:
        pytest.skip("there is a GPU")
    result = run("--results", tmp_path)
    assert result.returncode == 1
    assert result.stderr == "error: no GPU; run `retnet-tools doctor --device cuda` for the reason\n"
