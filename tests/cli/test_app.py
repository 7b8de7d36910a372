"""What every command shares: notes that can be silenced or multiplied, errors as JSON, tracebacks on demand."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from retnet_tools import console
from retnet_tools.formats import open_checkpoint
from retnet_tools.graph.export import plan_export, write_export
from retnet_tools.jobs import inspect as jobs

SHAKESPEARE = Path(__file__).parents[2] / "fixtures" / "shakespeare"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("app") / "out"
    plan = plan_export(open_checkpoint(SHAKESPEARE), dtype="float32", ops="fused")
    write_export(plan, out, force=False, progress=lambda count: None)
    return out


@pytest.mark.parametrize("flag", ["-q", "--quiet"])
@pytest.mark.parametrize("place", ["before", "behind"])
def test_quiet_leaves_the_result_and_no_note(flag: str, place: str, folder: Path, cli) -> None:
    words = ["generate", folder, "-p", "ROMEO. ", "-n", 4]
    loud, quiet = cli(*words), cli(*([flag, *words] if place == "before" else [*words, flag]))
    assert loud.err.startswith("prompt 6 tokens, ")
    assert (quiet.exit_code, quiet.err, quiet.out) == (0, "", loud.out)
    # The next run of this process is as loud as before.
    assert cli(*words).err.startswith("prompt 6 tokens, ")


@pytest.mark.parametrize(("level", "shown"), [(logging.INFO, True), (logging.ERROR, False)])
def test_quiet_shows_no_progress_on_a_terminal(level: int, shown: bool, monkeypatch, capsys) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(console.LOG, "level", level)
    console.LOG._cache.clear()
    with console.progress_bar() as progress:
        progress("verify", 1, 4)
        progress("verify", 2, 4)
    assert ("verify" in capsys.readouterr().err) == shown


def test_quiet_swallows_no_error(tmp_path: Path, cli) -> None:
    result = cli("export", tmp_path / "nothing", "-q")
    assert (result.exit_code, result.out) == (5, "")
    assert result.err.startswith("error: no such file or folder: ")


def test_verbose_says_what_is_opened_and_when(folder: Path, cli) -> None:
    result = cli("generate", folder, "-p", "ROMEO. ", "-n", 4, "-v")
    times = [float(time) for time in re.findall(r"^\[(\d+\.\d\d) s\] ", result.err, re.MULTILINE)]
    assert times == sorted(times)
    assert len(times) == result.err.count("\n") >= 3
    assert f"] opened {folder / 'decoder.onnx'} on cpu\n" in result.err
    assert result.err.endswith(" s] done\n")
    assert "opened" not in cli("generate", folder, "-p", "ROMEO. ", "-n", 4).err


def test_a_prompt_may_look_like_a_flag(folder: Path, cli) -> None:
    result = cli("generate", folder, "-p", "-q", "-n", 4)
    assert result.err.startswith("prompt 2 tokens, ")


@pytest.mark.parametrize(
    ("words", "kind", "code"),
    [
        (["export", "nothing/here", "--json"], "input", 5),
        (["verify", "--modes", "parallel", "--json"], "usage", 2),
        (["export", "--no-such-option", "--json"], "usage", 2),
        (["doctor", "--device", "tpu", "--json"], "usage", 2),
    ],
)
def test_an_error_is_a_document_where_json_is_asked_for(words: list[str], kind: str, code: int, cli) -> None:
    plain, result = cli(*words[:-1]), cli(*words)
    document = json.loads(result.out)
    error = document["error"]
    assert document["schema_version"] == 1
    assert (error["kind"], error["exit_code"], result.exit_code) == (kind, code, code)
    assert result.err.endswith(f"error: {error['message']}\n")
    assert (plain.out, plain.exit_code) == ("", code)
    parts = [error["found"], error["expected"] and f"expected {error['expected']}", error["hint"]]
    assert " ".join("; ".join(filter(None, parts)).split()) == error["message"]


@pytest.mark.parametrize(
    ("error", "kind", "found"),
    [
        (OSError(28, "No space left on device", "out"), "system", "No space left on device: out"),
        (OSError("odd"), "system", "odd"),
        (RuntimeError("odd"), "unexpected", "unexpected RuntimeError: odd"),
    ],
)
def test_errors_that_are_not_ours_are_told_from_failures(
    error: Exception, kind: str, found: str, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(jobs, "inspect", fail)
    result = cli("inspect", SHAKESPEARE, "--json")
    document = json.loads(result.out)["error"]
    assert (result.exit_code, document["kind"], document["found"]) == (1, kind, found)


def test_a_missing_argument_is_told_with_what_it_is(cli) -> None:
    result = cli("export")
    assert (result.exit_code, result.err.count("\n")) == (2, 1)
    assert "Missing argument 'CHECKPOINT': A folder, a file, or a name on the hub; see retnet-tools" in result.err


def test_a_command_that_fails_behind_its_own_document_prints_no_second_one(cli) -> None:
    result = cli("verify", "--tokens", 16, "--tolerance", 0, "--json")
    assert result.exit_code == 3
    document = json.loads(result.out)
    assert "error" not in document
    assert "error: " in result.err


@pytest.mark.parametrize("words", [["export", "nothing/here"], ["verify", "--modes", "parallel"], ["export", "--bad"]])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(words: list[str], cli) -> None:
    plain, debug = cli(*words), cli(*words, "--debug")
    assert debug.exit_code == plain.exit_code
    assert "Traceback" not in plain.err
    assert debug.err.startswith("Traceback")
    assert debug.err.endswith(plain.err)


def test_temp_is_temperature(folder: Path, cli) -> None:
    words = ["generate", folder, "-p", "ROMEO. ", "-n", 8, "--seed", 3]
    assert cli(*words, "--temp", 2).out == cli(*words, "--temperature", 2).out != cli(*words).out


def test_samples_that_will_all_be_the_same_are_called_so(folder: Path, cli) -> None:
    words = ["generate", folder, "-p", "ROMEO. ", "-n", 4, "--samples", 3]
    assert "--samples 3 at temperature 0: all 3 will be the same text\n" in cli(*words).err
    assert "the same text" not in cli(*words, "--temp", 1).err
