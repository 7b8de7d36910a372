"""`verify` of exported folders on the command line: both orders, the record, the report files, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from retnet_tools.evaluate.budget_file import default_budget_text
from retnet_tools.jobs.request import shipped_checkpoint
from retnet_tools.staging import locked
from tests.conftest import Run
from tests.helpers import BASE
from tests.planted_exports import EDITS, changed_byte, plant, stored_places
from tests.trials.against import write_model

SHORT = ("--tokens", 20, "--threads", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `model`, its export `model-onnx` beside it, and one with a fault, `bad`."""
    from retnet_tools.jobs.api import export

    folder = tmp_path_factory.mktemp("against")
    write_model(folder / "made", BASE, seed=1).rename(folder / "model")
    export(folder / "model", folder / "model-onnx")
    shutil.copytree(folder / "model-onnx", folder / "bad")
    assert plant(folder / "bad", EDITS["dropped_head_norm"], BASE)
    return folder


def test_either_order_and_the_record_alone_give_one_verdict(cli: Run, folder: Path) -> None:
    documents = []
    for arguments in (("model-onnx", "--against", "model"), ("model", "--against", "model-onnx"), ("model-onnx",)):
        words = [word if word.startswith("-") else folder / word for word in arguments]
        result = cli("verify", *words, "--json", *SHORT)
        assert result.exit_code == 0, result.err
        document = json.loads(result.out)
        assert document["schema_version"] == 1
        assert (document["export"], document["checkpoint"]) == (str(folder / "model-onnx"), str(folder / "model"))
        documents.append((document["checks"], document["passed"]))
    assert documents[0] == documents[1] == documents[2]
    checks, passed = documents[0]
    assert passed is True
    assert {"part", "name", "measured", "limit", "unit", "where", "figures", "passed"} == checks[0].keys()


def test_a_failure_ends_with_3_and_names_the_check_and_its_place(cli: Run, folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "new" / "report.xml"
    result = cli("verify", folder / "bad", "--against", folder / "model", "--junit", report, *SHORT)
    assert result.exit_code == 3
    assert result.err.startswith(f"error: {folder / 'bad'} is not an export of {folder / 'model'}: graphs, ")
    assert "position" in result.err
    assert len(result.err.splitlines()) == 1
    assert result.out.splitlines()[-1] == "failed"
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    cases = suite.findall("testcase")
    failures = [case for case in cases if case.find("failure") is not None]
    assert (int(suite.get("tests", 0)), int(suite.get("failures", 0))) == (len(cases), len(failures))
    assert 0 < len(failures) < len(cases)
    names = {(case.get("classname"), case.get("name")) for case in cases}
    assert len(names) == len(cases)
    assert ("verify.weights", "float weights") in names


def test_the_forms_are_reported_as_junit_too(cli: Run, folder: Path, tmp_path: Path) -> None:
    result = cli("verify", folder / "model", "--junit", tmp_path / "report.xml", *SHORT)
    assert result.exit_code == 0
    root = ElementTree.parse(tmp_path / "report.xml").getroot()
    names = {case.get("name") for case in root.iter("testcase")}
    assert {"parallel and recurrent", "1 tokens in chunkwise, continued in parallel"} <= names
    assert root.get("failures") == "0"
    again = cli("verify", folder / "model", "--junit", tmp_path / "report.xml", *SHORT)
    assert (again.exit_code, again.out) == (2, "")
    assert cli("verify", folder / "model", "--junit", tmp_path / "report.xml", "--force", *SHORT).exit_code == 0


def test_results_are_printed_where_the_report_cannot_be_written(
    cli: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ElementTree.ElementTree, "write", full)
    for model, code in (("model-onnx", 1), ("bad", 3)):
        result = cli(
            "verify", folder / model, "--against", folder / "model", "--junit", tmp_path / "report.xml", *SHORT
        )
        assert result.exit_code == code
        assert "checks passed" in result.out
        assert "the disk is full" in result.err
        assert list(tmp_path.iterdir()) == []


def test_a_report_that_another_process_writes_hides_no_verdict(cli: Run, folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    with locked(report):
        for model, code in (("model-onnx", 2), ("bad", 3)):
            result = cli("verify", folder / model, "--against", folder / "model", "--junit", report, *SHORT)
            assert result.exit_code == code
            assert "checks passed" in result.out
            assert "another process writes to" in result.err


def test_a_checkpoint_beside_the_export_goes_before_the_shipped_one(cli: Run, tmp_path: Path) -> None:
    """Of two checkpoints with the same weights the tokenizer tells which it was."""
    bare, out = tmp_path / "bare", tmp_path / "decoder"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(shipped_checkpoint() / name, bare / name)
    assert cli("export", bare, "-o", out).exit_code == 0
    result = cli("verify", out, "--json", *SHORT)
    assert result.exit_code == 0, result.err
    assert json.loads(result.out)["checkpoint"] == str(bare)


def test_what_costs_too_much_is_not_told_to_be_another_model(cli: Run, folder: Path, tmp_path: Path) -> None:
    strict = tmp_path / "strict.toml"
    strict.write_text("schema_version = 1\n[cost.float32]\nmean_kl = 0.0\n")
    result = cli("verify", folder / "model-onnx", "--against", folder / "model", "--budget", strict, *SHORT)
    assert result.exit_code == 3
    assert "costs more than its budget against" in result.err
    assert "choose other types, or a --budget" in result.err


@pytest.mark.parametrize("stopped", [False, True])
def test_an_export_without_its_manifest_is_named(stopped: bool, cli: Run, folder: Path, tmp_path: Path) -> None:
    out = shutil.copytree(folder / "model-onnx", tmp_path / "out")
    (out / "retnet.json").unlink()
    if stopped:
        (out / ".out.ready").mkdir()
        (out / ".out.ready" / ".plan.json").write_text("{}")
    for pair in ((out, "--against", folder / "model"), (folder / "model", "--against", out)):
        result = cli("verify", *pair, *SHORT)
        assert result.exit_code == 5
        assert f"{out} has no retnet.json" in result.err
        assert ("run the command that was stopped here again" in result.err) == stopped


def test_a_budget_is_no_json(cli: Run) -> None:
    assert cli("verify", "--print-budget").out == default_budget_text()
    assert cli("verify", "--print-budget", "--json").exit_code == 2


def test_the_source_is_found_by_its_hashes_and_by_nothing_else(cli: Run, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model-onnx", tmp_path / "a" / "decoder")
    refused = cli("verify", tmp_path / "a" / "decoder", *SHORT)
    assert (refused.exit_code, refused.out) == (2, "")
    assert "--against with the checkpoint" in refused.err
    assert len(refused.err.splitlines()) == 1
    shutil.copytree(folder / "model", tmp_path / "a" / "anything")
    assert cli("verify", tmp_path / "a" / "decoder", *SHORT).exit_code == 0
    changed = tmp_path / "a" / "anything" / "model.safetensors"
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    assert cli("verify", tmp_path / "a" / "decoder", *SHORT).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("model-onnx", "--modes", "parallel,recurrent,chunkwise"), "--modes with an exported folder"),
        (("model", "--against", "model-onnx", "--dtype", "fp32"), "--dtype with an exported folder"),
        (("model", "--against", "model-onnx", "--tolerance", "1"), "--tolerance with an exported folder"),
        (("model-onnx", "--against", "model", "--chunk-size", "5"), "--chunk-size with an exported folder"),
        (("model-onnx", "--against", "bad"), "are both exported folders"),
        (("model", "--against", "model"), "is an exported folder"),
        (("model", "--device", "cuda"), "--device for a checkpoint alone"),
        (("model", "--budget", "budget.toml"), "--budget for a checkpoint alone"),
        (("model-onnx", "--tokens", "3"), "at least 8"),
        (("model-onnx", "--device", "gpu"), "cpu, cuda or cuda:N"),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: tuple[str, ...], said: str, cli: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    result = cli("verify", *arguments, "--threads", 1)
    assert (result.exit_code, result.out) == (2, "")
    assert said in result.err
    assert len(result.err.splitlines()) == 1


def test_a_budget_that_is_none_ends_with_5_before_any_work(cli: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "budget.toml").write_text("schema_version = 1\n[cost.int8]\nmean_kl = nan\n")
    result = cli("verify", folder / "model-onnx", "--budget", tmp_path / "budget.toml", *SHORT)
    assert (result.exit_code, result.out) == (5, "")
    assert f"{tmp_path / 'budget.toml'}: cost.int8.mean_kl is nan" in result.err


def test_the_default_budget_is_printed(cli: Run) -> None:
    result = cli("verify", "--print-budget")
    assert (result.exit_code, result.out, result.err) == (0, default_budget_text(), "")


def test_a_changed_byte_ends_with_3_and_names_its_tensor(cli: Run, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model-onnx", tmp_path / "out")
    offset, size, _ = stored_places(tmp_path / "out")["layers.1.ffn.down_proj.weight"]
    changed_byte(tmp_path / "out", offset + size - 4, 1)
    result = cli("verify", tmp_path / "out", "--against", folder / "model", *SHORT)
    assert result.exit_code == 3
    assert f"weights, float weights: 1 bytes changed (layers.1.ffn.down_proj.weight, byte {size - 4})" in result.err


def test_an_export_of_before_decoder_onnx_is_held_as_it_is_and_named(cli: Run, folder: Path, tmp_path: Path) -> None:
    """What needs the graph says so before any work."""
    old = shutil.copytree(folder / "model-onnx", tmp_path / "old")
    document = json.loads((old / "retnet.json").read_text())
    for part in ("graphs", "files"):
        del document[part]["decoder.onnx"]
    (old / "retnet.json").write_text(json.dumps(document))
    (old / "decoder.onnx").unlink()
    held = cli("verify", old, "--against", folder / "model", *SHORT)
    assert held.exit_code == 0
    assert "no decoder.onnx, which retnet-tools runs: export again" in held.out + held.err
    for command in (
        ("generate", old, "-p", "1", "--token-ids"),
        ("quantize", old, "--quantize", "int8", "-o", tmp_path / "q"),
    ):
        result = cli(*command)
        assert result.exit_code == 5
        assert "decoder.onnx" in result.err
        assert "export" in result.err
    assert not (tmp_path / "q").exists()
