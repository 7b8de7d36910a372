"""The promise of `import retnet_tools`: its names, its examples, and that it costs next to nothing."""

from __future__ import annotations

import doctest
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import retnet_tools as rt
from retnet_tools.errors import UsageError
from retnet_tools.formats.canonical import write_canonical
from retnet_tools.jobs.request import shipped_checkpoint
from tests.helpers import BASE, random_source

HELD_OUT = Path(__file__).parent.parent / "fixtures" / "shakespeare" / "heldout.txt"
JOBS = ("convert", "export", "inspect", "perplexity", "quantize", "verify")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_the_examples_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(shipped_checkpoint(), tmp_path / "ckpt")
    (tmp_path / "text.txt").write_text(HELD_OUT.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(rt)
    assert (failed, tried > 12) == (0, True)


def test_every_promised_name_is_there_and_shown() -> None:
    assert all(getattr(rt, name) is not None for name in rt.__all__)
    assert set(rt.__all__) <= set(dir(rt))
    with pytest.raises(AttributeError, match="no attribute 'exports'"):
        rt.exports  # type: ignore[attr-defined]  # noqa: B018


def test_a_room_does_not_take_the_place_of_a_function() -> None:
    code = (
        "import retnet_tools.quantize.options, retnet_tools as rt; print(rt.quantize.__name__, callable(rt.quantize))"
    )
    assert run(code) == "quantize True"


@pytest.mark.parametrize("name", JOBS)
def test_a_function_has_the_arguments_and_the_documentation_of_its_request(name: str) -> None:
    function = getattr(rt, name)
    parameters = inspect.signature(function).parameters
    assert next(iter(parameters)) in ("checkpoint", "folder")
    for parameter in parameters:
        assert f"\n    {parameter}: " in function.__doc__, parameter


def test_importing_takes_nothing_heavy_and_no_time() -> None:
    heavy = ("torch", "onnxruntime", "onnx_ir", "numpy", "rich", "typer", "tokenizers")
    code = (
        "import sys, time; began = time.perf_counter(); import retnet_tools; took = time.perf_counter() - began;"
        f"print(took, [name for name in {heavy!r} if name in sys.modules])"
    )
    seconds = []
    while len(seconds) < 10 and min(seconds, default=1.0) >= 0.1:
        took, loaded = run(code).split(" ", 1)
        assert loaded == "[]"
        seconds.append(float(took))
    assert min(seconds) < 0.1


def test_paths_and_words_are_taken_as_they_are_written(tmp_path: Path) -> None:
    write_canonical(tmp_path / "ckpt", BASE, random_source(BASE, 1))
    result = rt.export(str(tmp_path / "ckpt"), str(tmp_path / "out"), dtype="half", exclude=[], quantize=None)
    assert (result.folder, result.plan.dtype, result.quality) == (tmp_path / "out", "float16", None)
    assert result.request.to_dict()["dtype"] == "float16"
    planned = rt.export(tmp_path / "ckpt", quantize="Q4", exclude="lm_head", dry_run=True)
    assert planned.folder == tmp_path / "ckpt-onnx-int4"
    assert planned.plan.quantization.scheme.exclude == ("lm_head",)
    assert not planned.folder.exists()


def test_a_failure_is_an_error_with_an_exit_code_and_leaves_nothing(tmp_path: Path) -> None:
    write_canonical(tmp_path / "ckpt", BASE, random_source(BASE, 1))
    with pytest.raises(rt.RetNetToolsError) as error:
        rt.export(tmp_path / "ckpt", tmp_path / "out", quantize="int4", exclude=("nothing",))
    assert isinstance(error.value, UsageError)
    assert "pattern 'nothing' is found in no matrix's name" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_the_package_is_a_command() -> None:
    result = subprocess.run([sys.executable, "-m", "retnet_tools", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"retnet-tools {rt.__version__}\n")
