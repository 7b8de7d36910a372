"""`retnet-tools generate` on random models: prompts, ids, JSON and errors. Text itself is tested on the fixture."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.exports import export
from tests.helpers import BASE, random_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(BASE, random_source(BASE, seed=21), tmp_path_factory.mktemp("generate") / "out")


def test_ids_go_in_and_out_where_there_is_no_tokenizer(folder: Path, cli) -> None:
    result = cli("generate", folder, "-p", "3 1 4 1 5", "-n", 6, "-t", 1)
    assert result.exit_code == 0
    assert len(result.out.split()) == 6
    assert all(0 <= int(word) < BASE.vocab_size for word in result.out.split())
    assert "tokens/s" in result.err
    assert result.err.count("\n") == 1


def test_a_first_token_waits_for_no_import_that_it_does_not_need(folder: Path) -> None:
    """Half a second for onnx_ir, most of it sympy's."""
    unneeded = ("torch", "onnx_ir", "sympy", "tokenizers", "retnet_tools.formats")
    code = f"import sys; sys.modules.update(dict.fromkeys({unneeded!r}))\nfrom retnet_tools.cli.app import main\nmain()"
    command = [sys.executable, "-c", code, "generate", str(folder), "-p", "3 1", "-n", "1", "-t", "1"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (result.returncode, len(result.stdout.split())) == (0, 1), result.stderr


def test_json_holds_the_same_tokens(folder: Path, cli) -> None:
    plain = cli("generate", folder, "-p", "3 1 4", "-n", 6)
    document = json.loads(cli("generate", folder, "-p", "3,1,4", "-n", 6, "--json").out)
    assert document["schema_version"] == 1
    assert document["tokens"] == [int(word) for word in plain.out.split()]
    assert document["text"] == plain.out.strip()
    assert document["stop_reason"] == "length"
    assert document["prompt_tokens"] == 3


def test_prompts_come_from_files_and_stdin_too(folder: Path, tmp_path: Path, monkeypatch, cli) -> None:
    expected = cli("generate", folder, "-p", "3 1 4", "-n", 5).out
    (tmp_path / "prompt.txt").write_text("3 1 4\n")
    assert cli("generate", folder, "-f", tmp_path / "prompt.txt", "-n", 5).out == expected
    for arguments in ([], ["-p", "-"]):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(b"3 1 4")))
        assert cli("generate", folder, *arguments, "-n", 5).out == expected


def test_the_chunk_size_changes_no_token(folder: Path, cli) -> None:
    prompt = " ".join(str(7 * i % 61) for i in range(40))
    expected = cli("generate", folder, "-p", prompt, "-n", 8).out
    for chunk_size in (1, 7, 1000):
        assert cli("generate", folder, "-p", prompt, "-n", 8, "--chunk-size", chunk_size).out == expected
    assert cli("generate", folder, "-p", prompt, "--chunk-size", 0).exit_code == 2


def test_seeds_choose_samples(folder: Path, cli) -> None:
    def draw(seed: int) -> str:
        return cli("generate", folder, "-p", "3", "-n", 20, "--temperature", 1.5, "--seed", seed).out

    assert draw(1) == draw(1) != draw(2)
    greedy = cli("generate", folder, "-p", "3", "-n", 20).out
    assert cli("generate", folder, "-p", "3", "-n", 20, "--temperature", 1, "--top-k", 1).out == greedy
    assert cli("generate", folder, "-p", "3", "-n", 20, "--temperature", 1, "--top-p", 1e-6).out == greedy


def test_samples_are_numbered_and_all_in_the_json(folder: Path, cli) -> None:
    options = ["-p", "3 1 4", "-n", 6, "--temperature", 1.5, "--samples", 3]
    plain, document = cli("generate", folder, *options), json.loads(cli("generate", folder, *options, "--json").out)
    texts = [sample["text"] for sample in document["samples"]]
    assert plain.out == "".join(f"[{i}] {text}\n" for i, text in enumerate(texts))
    assert len(set(texts)) == 3
    assert document["text"] == texts[0]
    assert document["prompt_tokens"] == 3


def test_a_stop_string_ends_the_stream(folder: Path, cli) -> None:
    whole = cli("generate", folder, "-p", "3 1 4", "-n", 10).out
    stop = " ".join(whole.split()[4:6])
    cut = cli("generate", folder, "-p", "3 1 4", "-n", 10, "--stop", stop, "--stop", "never")
    assert cut.out == whole[: whole.index(stop)] + "\n"
    assert "stopped at stop-string" in cut.err


def test_a_file_of_prompts_is_answered_and_resumed(folder: Path, tmp_path: Path, cli) -> None:
    rows = [{"id": i, "prompt": f"{i} 3"} for i in range(5)] + [{"id": 5}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["generate", folder, "--prompts", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "-n", 4, "-b", 2]
    result = cli(*arguments)
    assert (result.exit_code, result.err) == (0, "")
    assert result.out.startswith(
        f"{tmp_path / 'out.jsonl'}: 6 answers written, 1 of them errors, 0 were there; 20 tokens"
    )
    answers = (tmp_path / "out.jsonl").read_bytes()
    for i, line in enumerate(answers.splitlines()[:5]):
        assert json.loads(line)["text"] == cli("generate", folder, "-p", f"{i} 3", "-n", 4).out.strip()
    (tmp_path / "out.jsonl").write_bytes(answers[:-200])
    document = json.loads(cli(*arguments, "--json").out)
    assert (document["rows"], document["written"] + document["skipped"]) == (6, 6)
    assert (tmp_path / "out.jsonl").read_bytes() == answers
    refused = cli(*arguments, "--seed", 1)
    assert refused.exit_code == 2
    assert refused.err.count("\n") == 1


def test_rows_that_failed_are_answered_again_alone(folder: Path, tmp_path: Path, cli) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "1 2"}\n{"prompt": "61"}\n{"prompt": "3"}\n{"prompt": "x"}\n')
    arguments = ["generate", folder, "--prompts", source, "-o", out, "-n", 4]
    assert "4 answers written, 2 of them errors, 0 were there" in cli(*arguments).out
    source.write_text('{"prompt": "1 2"}\n{"prompt": "6 1"}\n{"prompt": "3"}\n{"prompt": "x"}\n')
    assert cli(*arguments).exit_code == 2
    assert "2 answers written, 1 of them errors, 2 were there" in cli(*arguments, "--retry-failed").out
    for wrong in (["-p", "1", "--retry-failed"], [*arguments[2:], "--retry-failed", "--force"]):
        refused = cli("generate", folder, *wrong)
        assert (refused.exit_code, "--retry-failed; expected --prompts" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-p", "61"], 2, "token id 61; expected 0 to 60"),
        (["-p", "one"], 2, "'one' where token ids are read"),
        (["-p", ""], 2, "an empty prompt"),
        (["-p", "1", "-n", "0"], 2, "--max-tokens 0"),
        (["-p", "1", "--temperature", "-1"], 2, "--temperature -1"),
        (["-p", "1", "--device", "gpu"], 2, "device 'gpu'"),
        (["-p", "1", "--seed", "-1"], 2, "--seed"),
        (["-p", "1", "-t", "100000"], 2, "--threads"),
        (["-p", "1", "--temprature", "1"], 2, "--temprature"),
        (["-p", "99999999999999999999"], 2, "where token ids are read"),
        (["-p", "\udcff"], 5, "not UTF-8"),
        (["-p", "1", "-f", "x"], 2, "both --prompt and --file"),
        (["-f", "no-such-file"], 5, "no file no-such-file"),
        (["-f", "."], 5, ". is a folder"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], code: int, message: str, folder: Path, cli) -> None:
    result = cli("generate", folder, *arguments)
    assert (result.exit_code, result.out) == (code, "")
    assert message in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1


def test_a_checkpoint_in_place_of_an_export_says_what_to_do(tmp_path: Path, cli) -> None:
    result = cli("generate", tmp_path, "-p", "1")
    assert result.exit_code == 5
    assert "export the checkpoint first" in result.err


def test_cuda_where_there_is_none_ends_with_exit_code_4(folder: Path, monkeypatch, cli) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    result = cli("generate", folder, "-p", "1", "--device", "cuda")
    assert result.exit_code == 4
    assert "no CUDA provider" in result.err


@pytest.mark.parametrize("name", ["step.onnx", "weights.data"])
def test_a_cut_export_ends_with_exit_code_5(name: str, folder: Path, tmp_path: Path, cli) -> None:
    out = shutil.copytree(folder, tmp_path / "out")
    with (out / name).open("r+b") as file:
        file.truncate((out / name).stat().st_size // 2)
    result = cli("generate", out, "-p", "1")
    assert (result.exit_code, result.out) == (5, "")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "float99"), ("state_dtype", 3), ("ops", "magic"), ("schema_version", 2)]
)
def test_a_manifest_with_other_values_is_refused(field: str, value: object, folder: Path, tmp_path: Path, cli) -> None:
    out = shutil.copytree(folder, tmp_path / "out")
    document = json.loads((out / "retnet.json").read_text())
    (out / "retnet.json").write_text(json.dumps({**document, field: value}))
    result = cli("generate", out, "-p", "1")
    assert (result.exit_code, result.out) == (5, "")
    assert field in result.err
    assert result.err.count("\n") == 1


def test_standard_streams_may_be_closed_or_narrow(folder: Path) -> None:
    command = [sys.executable, "-m", "retnet_tools.cli.app", "generate", str(folder), "-n", "3"]
    closed = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *command], capture_output=True, text=True)
    assert (closed.returncode, closed.stderr.count("\n")) == (2, 1)
    mute = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command, "-p", "1"], capture_output=True, text=True)
    assert (mute.returncode, mute.stderr.count("\n")) == (0, 1)


def test_a_reader_that_goes_away_is_no_error(folder: Path) -> None:
    command = f"{sys.executable} -m retnet_tools.cli.app generate {folder} -p 1 -n 3000 | head -c 5"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert "error" not in result.stderr
    assert "Traceback" not in result.stderr
