"""`--device cuda` means CUDA in every command; `--allow-cpu-fallback` is said aloud."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest

from retnet_tools.cli import app
from tests.bench.inline import measure_inline
from tests.exports import export
from tests.fake_gpu import FakeGpu, needs_fake_gpu
from tests.helpers import BASE, random_source

HELD_OUT = Path(__file__).parents[2] / "fixtures" / "shakespeare" / "heldout.txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(BASE, random_source(BASE, 1), tmp_path_factory.mktemp("fallback") / "out")


def commands(folder: Path, scratch: Path) -> dict[str, tuple[object, ...]]:
    """Each command that runs a model on a device."""
    text = scratch / "text"
    text.write_text(" ".join(str(i % 61) for i in range(40)))
    return {
        "generate": ("generate", folder, "-p", "1 2 3", "-n", 3),
        "state save": ("state", "save", folder, "-p", "1 2 3", "-o", scratch / "state"),
        "perplexity": ("perplexity", folder, "--text", text, "--token-ids", "-c", 8),
        "bench": ("bench", folder, "--quick", "-p", 4, "-n", 2, "-r", 1),
    }


NAMES = ("generate", "state save", "perplexity", "bench")


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("name", NAMES)
def test_a_device_that_cannot_be_had_is_exit_code_4(name: str, folder: Path, tmp_path: Path, cli) -> None:
    result = cli(*commands(folder, tmp_path)[name], "--device", "cuda")
    assert (result.exit_code, result.out) == (4, "")
    assert "no CUDA provider" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("name", NAMES)
def test_a_fallback_runs_on_the_cpu_and_warns(
    name: str, folder: Path, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_inline(monkeypatch)
    said: list[str] = []
    monkeypatch.setattr(app, "_show_warning", lambda message, *rest: said.append(str(message)))
    result = cli(*commands(folder, tmp_path)[name], "--device", "cuda", "--allow-cpu-fallback")
    assert result.exit_code == 0
    assert "this onnxruntime has no CUDA provider" in said[0]
    assert said[0].endswith("running on the CPU, as --allow-cpu-fallback says")


@pytest.mark.usefixtures("no_cuda")
def test_the_report_of_a_benchmark_that_fell_back_says_cpu(
    folder: Path, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_inline(monkeypatch)
    monkeypatch.setattr(app, "_show_warning", lambda *rest: None)
    arguments = commands(folder, tmp_path)["bench"]
    document = json.loads(cli(*arguments, "--device", "cuda", "--allow-cpu-fallback", "--json").out)
    assert '"cuda"' not in json.dumps(document)


def test_a_warning_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    app._show_warning(UserWarning("something"), UserWarning, "file", 1)
    assert capsys.readouterr() == ("", "warning: something\n")


@needs_fake_gpu
@pytest.mark.parametrize("name", ["generate", "state save", "perplexity"])
def test_every_command_runs_on_the_device(name: str, folder: Path, tmp_path: Path) -> None:
    """A GPU that computes nothing gives zeros, and zeros are logits."""
    arguments = commands(folder, tmp_path)[name]
    result = FakeGpu().run("-m retnet_tools.cli.app", *arguments, "--device", "cuda", check=False)
    assert (result.returncode, "warning" in result.stderr) == (0, False), result.stderr
