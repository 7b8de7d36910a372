"""A place that cannot be written is found before the work, and what was computed is shown whatever becomes of files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.exports import export
from tests.helpers import BASE, random_source

SHAKESPEARE = Path(__file__).parents[2] / "fixtures" / "shakespeare"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export of random weights, texts, and `blocked`, which is a file."""
    folder = tmp_path_factory.mktemp("side")
    export(BASE, random_source(BASE, 1), folder / "random")
    (folder / "ids.txt").write_text(" ".join(str(7 * i % 61) for i in range(90)))
    (folder / "text.txt").write_text((SHAKESPEARE / "heldout.txt").read_text()[:1500])
    (folder / "prompts.jsonl").write_text('{"tokens": [1, 2]}\n')
    (folder / "blocked").write_text("a file, and no folder")
    return folder


BLOCKED = [
    "perplexity nothing --text ids.txt --plot blocked/a.svg",
    "bench nothing --plot blocked/a.svg",
    "verify nothing --junit blocked/a.xml",
    "generate nothing -p 1 --state-out blocked/a.state",
    "generate nothing --prompts prompts.jsonl -o blocked/a.jsonl",
    "generate nothing --prompts prompts.jsonl -o .",
    "state save nothing -p 1 -o blocked/a.state",
    "state fork nothing.state -o blocked/a.state",
    "quantize nothing --quantize int8 -o blocked/out",
    f"export {SHAKESPEARE} -o blocked/out",
    f"convert {SHAKESPEARE} blocked/out",
]


@pytest.mark.parametrize("line", BLOCKED)
def test_a_place_that_takes_no_file_is_found_before_anything_is_opened(
    line: str, work: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    monkeypatch.chdir(work)
    before = sorted(work.rglob("*"))
    result = cli(*line.split(), "--json")
    error = json.loads(result.out)["error"]
    assert (result.exit_code, error["kind"]) == (1, "failure")
    assert "blocked is a file" in error["found"] or error["found"] == ". is a folder"
    assert sorted(work.rglob("*")) == before


def no_room(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """A disk that is full once the target is to take its place."""
    replace = os.replace

    def fail(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> None:
        if Path(destination).name == target:
            raise OSError(errno.ENOSPC, "No space left on device", str(destination))
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fail)


def in_the_way(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """A folder that takes the target's place while the work goes on."""
    from retnet_tools import staging

    check, calls = staging.check_file, []

    def checked(path: Path, *, force: bool) -> None:
        check(path, force=force)
        if path.name == target and not calls:
            path.mkdir()
            calls.append(path)

    monkeypatch.setattr(staging, "check_file", checked)
    for module in ("retnet_tools.plotting", "retnet_tools.runtime.bulk"):
        monkeypatch.setattr(f"{module}.check_file", checked)


SIDE = [
    ("perplexity random --token-ids --text ids.txt -c 32 -t 1 --plot a.svg", "a.svg"),
    ("generate random -p 1,2 -n 4 --state-out a.state", "a.state"),
    ("verify --modes parallel,recurrent --tokens 4 --junit a.xml", "a.xml"),
]


@pytest.mark.parametrize("fail", [no_room, in_the_way])
@pytest.mark.parametrize(("line", "target"), SIDE)
def test_what_was_computed_is_one_document_although_a_file_fails(
    line: str,
    target: str,
    fail: Callable[[pytest.MonkeyPatch, str], None],
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cli,
) -> None:
    for name in ("random", "ids.txt"):
        (tmp_path / name).symlink_to(work / name)
    monkeypatch.chdir(tmp_path)
    healthy = cli(*line.split(), "--json")
    assert healthy.exit_code == 0, healthy.err
    os.remove(target)
    fail(monkeypatch, target)
    result = cli(*line.split(), "--json")
    assert result.exit_code == 1, result.err
    document = json.loads(result.out)
    assert document.keys() == json.loads(healthy.out).keys()
    assert "error" not in document
    assert result.err.splitlines()[-1].startswith("error: ")
    assert target in result.err
    assert {path.name for path in tmp_path.iterdir()} <= {"random", "ids.txt", target}
    assert not Path(target).is_file()


def test_a_text_is_shown_although_its_state_is_not_kept(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    words = ("generate", work / "random", "-p", "1,2", "-n", 4)
    healthy = cli(*words)
    no_room(monkeypatch, "a.state")
    result = cli(*words, "--state-out", tmp_path / "a.state")
    assert (result.exit_code, result.out) == (1, healthy.out)
    assert result.err.splitlines()[-1] == (
        f"error: the disk is full: {tmp_path / 'a.state'} not written; expected free space; free space"
    )


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("command", ["quantize", "export"])
def test_figures_are_shown_although_the_folder_does_not_take_them(
    command: str, as_json: bool, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    source = SHAKESPEARE
    if command == "quantize":
        source = tmp_path / "float"
        assert cli("export", SHAKESPEARE, "-o", source).exit_code == 0
    words = (command, source, "--quantize", "int8", "--text", work / "text.txt", "--text-tokens", 520)
    no_room(monkeypatch, "retnet.json")
    result = cli(*words, "-o", tmp_path / "out", *["--json"] * as_json)
    assert (result.exit_code, result.err.splitlines()[-1].startswith("error: the disk is full")) == (1, True)
    if as_json:
        quality = json.loads(result.out)["quality"]
        assert quality["tokens"] > 0
        assert quality["mean_kl"] < 0.01
    else:
        assert "wrote " in result.out
        assert "KL" in result.out


def test_a_folder_whose_figures_cannot_be_measured_is_shown(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    from retnet_tools.errors import InputError
    from retnet_tools.evaluate import quality

    def fail(*_: object, **__: object) -> None:
        raise InputError("logits that are not finite")

    monkeypatch.setattr(quality, "measure_perplexity", fail)
    words = ("export", SHAKESPEARE, "--quantize", "int8", "--text", work / "text.txt", "-o", tmp_path / "out")
    result = cli(*words, "--json")
    document = json.loads(result.out)
    assert (result.exit_code, result.err.splitlines()[-1]) == (5, "error: logits that are not finite")
    assert (document["output"], document["quality"]) == (str(tmp_path / "out"), None)
