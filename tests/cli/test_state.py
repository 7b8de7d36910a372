"""`retnet-tools state`, and `generate` from and to states."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from retnet_tools.formats.canonical import write_canonical
from tests.exports import export
from tests.helpers import BASE, random_source

PROMPT = "3 1 4 1 5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(BASE, random_source(BASE, seed=81), tmp_path_factory.mktemp("state") / "out")


def test_a_prompt_saved_once_goes_on_like_the_prompt(folder: Path, tmp_path: Path, cli) -> None:
    state = tmp_path / "a.state"
    saved = cli("state", "save", folder, "-p", PROMPT, "-o", state)
    assert (saved.exit_code, saved.err) == (0, "")
    assert "2 layers of 4 x 8 x 12, float32" in saved.out
    whole = cli("generate", folder, "-p", f"{PROMPT} 9 2", "-n", 8).out
    assert cli("generate", folder, "--state-in", state, "-p", "9 2", "-n", 8).out == whole
    plain = cli("generate", folder, "-p", PROMPT, "-n", 8).out
    assert cli("generate", folder, "--state-in", state, "-n", 8).out == plain


def test_a_model_with_nan_is_exported_with_a_warning_and_its_state_is_not_kept(tmp_path: Path, cli) -> None:
    source = random_source(BASE, seed=81)
    # A row of k of the third head.
    source.tensors["layers.0.retention.k_proj.weight"][17, 2] = np.nan
    write_canonical(tmp_path / "ckpt", BASE, source)
    result = cli("export", tmp_path / "ckpt", "-o", tmp_path / "out")
    note = "NaN or infinite weights in layers.0.retention.k_proj.weight (1): all that they reach is NaN"
    assert (result.exit_code, result.err) == (0, f"warning: {note}\n")
    assert f"  note: {note}\n" in result.out
    assert json.loads((tmp_path / "out" / "retnet.json").read_text())["provenance"]["notes"] == [note]
    saved = cli("state", "save", tmp_path / "out", "-p", PROMPT, "-o", tmp_path / "a.state", "--json")
    error = json.loads(saved.out)["error"]
    assert (saved.exit_code, error["kind"]) == (5, "input")
    assert error["found"] == "24 NaN or infinite values in the state of layer 0, head 2"
    assert not list(tmp_path.glob("*.state*"))
    refused = cli("quantize", tmp_path / "out", "--quantize", "int8")
    assert (refused.exit_code, "k_proj.weight' holds 1 NaN" in refused.err) == (5, True)


def test_a_text_in_two_halves_is_the_whole_text(folder: Path, tmp_path: Path, cli) -> None:
    options = ["--temperature", 1.3, "--seed", 6, "--repetition-penalty", 1.2]
    whole = cli("generate", folder, "-p", PROMPT, "-n", 20, *options).out.split()
    first = cli("generate", folder, "-p", PROMPT, "-n", 9, *options, "--state-out", tmp_path / "a").out.split()
    rest = cli("generate", folder, "--state-in", tmp_path / "a", "-n", 11, "--state-out", tmp_path / "b").out.split()
    assert first + rest == whole
    cli("generate", folder, "-p", PROMPT, "-n", 20, *options, "--state-out", tmp_path / "c")
    assert cli("state", "diff", tmp_path / "b", tmp_path / "c", "--tolerance", 0).exit_code == 0


def test_info_counts_and_hashes_what_a_state_holds(folder: Path, tmp_path: Path, cli) -> None:
    cli("state", "save", folder, "-p", PROMPT, "-o", tmp_path / "a")
    document = json.loads(cli("state", "info", tmp_path / "a", "--json").out)
    (row,) = document["rows"]
    assert (row["position"], row["distinct_tokens"], len(row["state_norms"])) == (5, 4, 2)
    assert document["state_shape"] == [4, 8, 12]
    assert document["bytes"] == (tmp_path / "a").stat().st_size
    assert document["fingerprint"]["dtype"] == "float32"
    assert [*document["sampling"]] == ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"]
    assert row["tokens_sha256"][:12] in cli("state", "info", tmp_path / "a").out


def test_load_shows_what_comes_next(folder: Path, tmp_path: Path, cli) -> None:
    cli("state", "save", folder, "-p", PROMPT, "-o", tmp_path / "a")
    (row,) = json.loads(cli("state", "load", folder, tmp_path / "a", "-n", 61, "--json").out)["rows"]
    greedy = cli("generate", folder, "-p", PROMPT, "-n", 1).out.strip()
    assert row["next"][0]["text"] == greedy
    assert sum(item["probability"] for item in row["next"]) == pytest.approx(1)
    assert "row 0: 5 tokens; next" in cli("state", "load", folder, tmp_path / "a").out


def test_forks_are_rows_of_one_file(folder: Path, tmp_path: Path, cli) -> None:
    cli("generate", folder, "-p", PROMPT, "-n", 1, "--temperature", 1.5, "--state-out", tmp_path / "a")
    forked = cli("state", "fork", tmp_path / "a", "-n", 3, "-o", tmp_path / "b", "--json")
    assert [row["position"] for row in json.loads(forked.out)["rows"]] == [6, 6, 6]
    assert json.loads(forked.out)["sampling"]["temperature"] == 1.5
    samples = json.loads(cli("generate", folder, "--state-in", tmp_path / "b", "-n", 12, "--json").out)["samples"]
    assert len({tuple(sample["tokens"]) for sample in samples}) == 3
    assert cli("state", "fork", tmp_path / "b", "--rows", "2,0", "-n", 1, "-o", tmp_path / "c").exit_code == 0
    again = json.loads(cli("generate", folder, "--state-in", tmp_path / "c", "-n", 12, "--json").out)["samples"]
    assert [sample["tokens"] for sample in again] == [samples[2]["tokens"], samples[0]["tokens"]]


def test_diff_says_where_states_part(folder: Path, tmp_path: Path, cli) -> None:
    for name, prompt in {"a": "3 1 4", "b": "3 1 5", "c": "3 1 4 4"}.items():
        cli("state", "save", folder, "-p", prompt, "-o", tmp_path / name)
    document = json.loads(cli("state", "diff", tmp_path / "a", tmp_path / "b", "--json").out)
    assert (document["same_tokens"], document["same_positions"], document["other_fingerprint"]) == (False, True, [])
    assert document["max_rel"] > 0
    text = cli("state", "diff", tmp_path / "a", tmp_path / "c").out
    assert "tokens     different\npositions  different\nshapes     the same\nmodel      the same\n" in text
    failed = cli("state", "diff", tmp_path / "a", tmp_path / "b", "--tolerance", 1)
    assert failed.exit_code == 3
    assert failed.err == "error: the states have different tokens; expected the same tokens\n"
    standard = export(BASE, random_source(BASE, seed=81), tmp_path / "standard", ops="standard")
    cli("state", "save", standard, "-p", "3 1 4", "-o", tmp_path / "s")
    assert cli("state", "diff", tmp_path / "a", tmp_path / "s", "--tolerance", 1e-5).exit_code == 0
    half = export(BASE, random_source(BASE, seed=81), tmp_path / "half", dtype="float16")
    cli("state", "save", half, "-p", "3 1 4", "-o", tmp_path / "h")
    failed = cli("state", "diff", tmp_path / "a", tmp_path / "h", "--tolerance", 1)
    assert (failed.exit_code, failed.err) == (3, "error: the states differ in dtype; expected one model\n")


def test_a_state_of_another_model_ends_with_exit_code_5(folder: Path, tmp_path: Path, cli) -> None:
    cli("state", "save", folder, "-p", PROMPT, "-o", tmp_path / "a")
    half = export(BASE, random_source(BASE, seed=81), tmp_path / "half", dtype="float16")
    for arguments in (["generate", half, "--state-in", tmp_path / "a"], ["state", "load", half, tmp_path / "a"]):
        result = cli(*arguments)
        assert (result.exit_code, result.out) == (5, "")
        assert result.err.startswith("error: a state of dtype float32; expected dtype float16")
        assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["state"], 2, "Missing command"),
        (["state", "info", "{tmp}/none"], 5, "no file"),
        (["state", "info", "{tmp}/text"], 5, "text"),
        (["state", "save", "{folder}", "-p", "1", "-o", "{tmp}/a"], 2, "exists already"),
        (["state", "save", "{folder}", "-p", "1", "-o", "{tmp}"], 1, "is a folder"),
        (["state", "save", "{folder}", "-p", "", "-o", "{tmp}/new"], 2, "an empty prompt"),
        (["state", "save", "{folder}", "-p", "1"], 2, "'--output'"),
        (["state", "fork", "{tmp}/a", "--rows", "1", "-o", "{tmp}/new"], 2, "rows"),
        (["state", "fork", "{tmp}/a", "--rows", "x", "-o", "{tmp}/new"], 2, "--rows 'x'"),
        (["generate", "{folder}", "-p", "1", "--state-out", "{tmp}/a"], 2, "exists already"),
        (["generate", "{folder}", "--state-in", "{tmp}/none"], 5, "no file"),
        (["generate", "{folder}", "--state-in", "{tmp}/a", "-p", ""], 2, "an empty prompt"),
        (["generate", "{folder}", "-p", "1", "--min-p", "2"], 2, "--min-p 2"),
        (["generate", "{folder}", "-p", "1", "--stop", ""], 2, "an empty --stop"),
        (["generate", "{folder}", "-p", "1", "--repetition-penalty", "0"], 2, "--repetition-penalty 0"),
        (["generate", "{folder}", "-p", "1", "--samples", "0"], 2, "--samples"),
        (["generate", "{folder}", "-p", "1", "-o", "{tmp}/new"], 2, "--prompts and -o belong together"),
        (["generate", "{folder}", "--prompts", "{tmp}/a"], 2, "--prompts and -o belong together"),
        (["generate", "{folder}", "--prompts", "{tmp}/a", "-o", "{tmp}/new", "-p", "1"], 2, "one job at a time"),
        (["generate", "{folder}", "--prompts", "{tmp}/none", "-o", "{tmp}/new"], 5, "no file"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    arguments: list[str], code: int, message: str, folder: Path, tmp_path: Path, cli
) -> None:
    cli("state", "save", folder, "-p", PROMPT, "-o", tmp_path / "a")
    (tmp_path / "text").write_text("no state at all")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = cli(*(argument.format(tmp=tmp_path, folder=folder) for argument in arguments))
    assert (result.exit_code, result.out) == (code, "")
    assert message in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_state_is_not_left_half_written(folder: Path, tmp_path: Path, monkeypatch, cli) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("retnet_tools.runtime.state_file.write_safetensors", full)
    result = cli("state", "save", folder, "-p", "1", "-o", tmp_path / "new" / "a.state")
    assert (result.exit_code, result.out) == (1, "")
    assert "the disk is full" in result.err
    assert list(tmp_path.iterdir()) == []
    shutil.rmtree(tmp_path)
