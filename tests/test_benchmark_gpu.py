"""`make bench-gpu`: one command that tries everything, keeps what came of it, and goes on where it was stopped."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from retnet_tools.cli.app import app
from tests.fake_gpu import ROOT, FakeGpu, needs_fake_gpu

SCRIPT = """
import runpy, sys
sys.path.insert(0, "benchmarks")
sys.argv[0] = "gpu.py"
globals_ = runpy.run_path("benchmarks/gpu.py")
globals_["main"]()
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def gpu_steps(scripts):
    return scripts("gpu_steps")


def test_a_step_that_does_not_exist_is_refused() -> None:
    for option in ("--only", "--from"):
        result = run(option, "doctor,nothing" if option == "--only" else "nothing")
        assert result.returncode == 2
        assert "no step nothing" in result.stderr


def test_steps_are_listed_in_order_and_from_one_on() -> None:
    names = [line.split()[0] for line in run("--list").stdout.splitlines()]
    assert names[:2] == ["imports", "doctor"]
    assert names[-1] == "tests"
    assert names.index("tests-first") < names.index("6.7b-float16") < names.index("float16") < names.index("tests")
    later = [line.split()[0] for line in run("--list", "--from", "float16").stdout.splitlines()]
    assert later == names[names.index("float16") :]


def test_scripts_that_a_host_was_given_are_steps_too(gpu_steps, tmp_path: Path) -> None:
    plain = [step.name for step in gpu_steps.steps()]
    assert [step.name for step in gpu_steps.steps(tmp_path)] == plain
    (tmp_path / "smoke.py").write_text("")
    (tmp_path / "probe.py").write_text("")
    names = [step.name for step in gpu_steps.steps(tmp_path)]
    assert set(names) - set(plain) == {"smoke", "probe"}
    assert names[:3] == ["imports", "doctor", "smoke"]
    assert [line.split()[0] for line in run("--list", "--scripts", tmp_path).stdout.splitlines()] == names


def test_what_cannot_be_imported_is_named_in_one_line() -> None:
    """Python without its installed packages."""
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, 'benchmarks')\n{SCRIPT}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {sys.executable} has no numpy, ml_dtypes, onnx, onnx_ir, onnxruntime, ")
    assert result.stderr.count("\n") == 1


def test_every_benchmark_among_the_steps_is_a_command_that_bench_takes(gpu_steps) -> None:
    command = typer.main.get_command(app).commands["bench"]
    records = [step.record for step in gpu_steps.steps() if step.record is not None]
    assert len(records) == len(set(records)) >= 10
    known = {option for parameter in command.params for option in parameter.opts}
    for record in records:
        # What another part of the house adds to `bench` is not here yet.
        words = shlex.split(record)[2:]
        for name, values in (("--no-cuda-graph", 0), ("--chunk-size", 1)):
            if name in words and name not in known:
                place = words.index(name)
                del words[place : place + 1 + values]
        assert command.make_context("bench", words).params["device"] == "cuda"


@needs_fake_gpu
def test_the_tests_that_come_first_exist(gpu_steps) -> None:
    collect = "-m pytest --collect-only -q -p no:cacheprovider"
    assert f"{len(gpu_steps.TESTS)} tests collected" in FakeGpu().run(collect, *gpu_steps.TESTS).stdout


def arguments(folder: Path, *more: object) -> tuple[object, ...]:
    return ("--quick", "--state", folder / "state", "--results", folder / "out", *more)


@needs_fake_gpu
def test_results_are_kept_with_their_machine_and_failures_stop_nothing(tmp_path: Path) -> None:
    only = arguments(tmp_path, "--only", "doctor,retention-prompt,retention")
    result = FakeGpu().run(SCRIPT, *only, check=False)
    assert (result.returncode, result.stderr) == (1, "failed: doctor\n")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["gpu.json"]
    pack = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert pack["machine"]["devices"][0]["name"] == "Fake GPU 0"
    assert pack["machine"]["onnxruntime"].startswith("onnxruntime-gpu ")
    steps = {step["step"]: step for step in pack["steps"]}
    doctor, prompt, retention = (steps[name] for name in ("doctor", "retention-prompt", "retention"))
    # A GPU that computes nothing fails its self-test.
    assert (doctor["exit_code"], doctor["result"]["self_test_passed"]) == (1, False)
    assert (retention["exit_code"], prompt["exit_code"]) == (0, 0), (retention, prompt)
    assert {row["form"] for row in retention["result"]["rows"]} == {"operator", "products", "split/2", "split/4"}
    assert all("us_captured" in row for row in retention["result"]["rows"]), retention["result"]["rows"]
    assert [row["form"] for row in prompt["result"]["rows"]] == ["operator, keys in 1", "chunks of 64"]
    assert all("speedup" in row for row in prompt["result"]["rows"]), prompt["result"]["rows"]
    again = FakeGpu().run(SCRIPT, *only, check=False)
    assert again.returncode == 1
    assert "doctor: there already, exit code 1\n" in again.stdout
    assert "retention: there already, exit code 0\n" in again.stdout


@needs_fake_gpu
def test_a_model_is_written_once_and_measured_by_several_steps(tmp_path: Path) -> None:
    result = FakeGpu().run(SCRIPT, *arguments(tmp_path, "--only", "int8,float16,batches"), check=False)
    assert result.returncode == 0, (result.stderr, (tmp_path / "out" / "gpu.json").read_text()[-3000:])
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == [
        *("model-1.3b-fp16", "float16", "model-1.3b-int8", "int8", "batches")
    ]
    steps = {step["step"]: step for step in json.loads((tmp_path / "out" / "gpu.json").read_text())["steps"]}
    assert steps["int8"]["result"]["rows"][0]["quantization"].startswith("int8")
    assert steps["float16"]["result"]["rows"][0]["dtype"] == "float16"


@needs_fake_gpu
def test_steps_for_which_there_is_no_time_are_left_for_another_call(tmp_path: Path) -> None:
    some = ("--only", "retention,retention-prompt")
    result = FakeGpu().run(SCRIPT, *arguments(tmp_path, *some, "--minutes", 2))
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == [
        *("retention-prompt", "retention", "for another call")
    ]
    assert "retention: takes 4.0 minutes, and " in result.stdout
    assert result.stdout.endswith("for another call: retention\n")
    assert "retention-prompt: ... exit code 0" in result.stdout
    later = FakeGpu().run(SCRIPT, *arguments(tmp_path, *some))
    assert "retention-prompt: there already, exit code 0\nretention: ... exit code 0" in later.stdout


@needs_fake_gpu
def test_a_step_that_runs_out_of_time_is_ended_and_runs_again_where_there_is_more(tmp_path: Path) -> None:
    code = SCRIPT.replace(
        'globals_["main"]()',
        """
from gpu_steps import PYTHON, Step
sleep = Step("sleep", (*PYTHON, "-c", "import time; print('began', flush=True); time.sleep(600)"), 0.0)
globals_["main"].__globals__["steps"] = lambda scripts: [sleep]
globals_["main"]()
""",
    )
    result = FakeGpu().run(code, *arguments(tmp_path, "--minutes", 0.2), check=False)
    assert (result.returncode, result.stderr) == (1, "failed: sleep\n")
    (step,) = json.loads((tmp_path / "out" / "gpu.json").read_text())["steps"]
    assert (step["exit_code"], step["timed_out"], step["stdout"]) == (None, True, "began\n")
    assert step["seconds"] < 120
    result = FakeGpu().run(code, *arguments(tmp_path, "--minutes", 0.1), check=False)
    assert result.stdout == "sleep: there already, exit code None\n"
    result = FakeGpu().run(code, *arguments(tmp_path, "--minutes", 0.3), check=False)
    assert "sleep: ... exit code None" in result.stdout


def test_records_are_made_of_results(tmp_path: Path, gpu_steps) -> None:
    import gpu

    step = {"exit_code": 0, "quick": False, "recorded": "2026-11-24", "seconds": 61.3, "result": {"rows": [1]}}
    record = "retnet-tools bench --size 1.3b"
    steps = [
        {**step, "step": "float16", "record": record},
        {**step, "step": "doctor", "record": None},
        {**step, "step": "int8", "record": record, "quick": True},
        {**step, "step": "int4", "record": record, "exit_code": 4},
    ]
    (tmp_path / "gpu.json").write_text(json.dumps({"machine": {}, "commit": "abc", "steps": steps}))
    assert gpu.unpack(tmp_path / "gpu.json", tmp_path / "bench") == [tmp_path / "bench" / "cuda-float16.json"]
    assert json.loads((tmp_path / "bench" / "cuda-float16.json").read_text()) == {
        "command": record,
        "recorded": "2026-11-24",
        "commit": "abc",
        "seconds": 61,
        "rows": [1],
    }


def test_without_a_gpu_it_says_where_to_look(tmp_path: Path) -> None:
    from tests.cuda_device import why_not

    if why_not() is None:
        pytest.skip("there is a GPU")
    result = run("--results", tmp_path, "--state", tmp_path)
    assert result.returncode == 1
    assert result.stderr == "error: no GPU; run `retnet-tools doctor --device cuda` for the reason\n"
