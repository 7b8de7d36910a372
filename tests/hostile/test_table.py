"""Every hostile input of the tables is refused in one line that names it, soon, in little memory, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from tests.hostile import export_cases, tensor_cases, text_cases, torch_cases
from tests.hostile.judge import CODES, Case, listing, refusal
from tests.hostile.material import MATERIAL, put, reader, whole

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and address limits are of POSIX")
TABLES = (
    *(torch_cases.zip_cases, torch_cases.legacy_cases, torch_cases.lightning_cases),
    *(tensor_cases.safetensors_cases, tensor_cases.shard_cases, tensor_cases.dcp_cases, tensor_cases.config_cases),
    *(export_cases.manifest_cases, export_cases.graph_cases, export_cases.state_cases),
    *(text_cases.tokenizer_cases, text_cases.vocabulary_cases, text_cases.text_cases, text_cases.row_cases),
    *(text_cases.answer_cases, text_cases.unfinished_cases, text_cases.budget_cases),
)
KINDS = (*MATERIAL, *(f"config {layout}" for layout in tensor_cases.SIZES))
COMMANDS = {
    "zip": ("inspect", "."),
    "shards": ("export", ".", "-o", "out"),
    "dcp": ("convert", ".", "out"),
    "export": ("quantize", ".", "-o", "out", "--quantize", "int8"),
    "run": ("generate", ".", "--token-ids", "-p", "1 2"),
    "state": ("state", "inspect", "a.state"),
    "rows": ("generate", "../export", "--token-ids", "--prompts", "prompts.jsonl", "-o", "out"),
}
BY_COMMAND = (
    *("zip: a pickle of 64 MB of zeros, deflated", "zip: model.pt is a pipe", "zip: the pickle of endless objects"),
    *("shards: a shard '/etc/passwd'", "shards: model-1.safetensors is a device", "dcp: sizes (1099511627776, 8)"),
    *(
        "export: tokenizer_files = 'ab/c'",
        "export: 300,000 nodes",
        "run: an unknown operator",
        "run: data in '/etc/passwd'",
    ),
    *("state: positions [3, 4611686018427387904]", "state: nan in logits", "rows: a line of 17 MB", "rows: UTF-16"),
)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_every_input_is_refused(table: object, tmp_path: Path) -> None:
    failures = []
    for number, case in enumerate(table()):
        try:
            refusal(case, tmp_path / str(number))
        except Exception as error:
            failures.append(f"{case}: {type(error).__name__}: {error}")
    assert failures == []


def test_there_are_hundreds_and_all_differ() -> None:
    cases = [case for table in TABLES for case in table()]
    names = [str(case) for case in cases]
    assert len(set(names)) == len(names) >= 1000


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_read(kind: str, tmp_path: Path) -> None:
    reader(kind)(put(whole(kind), tmp_path / "input"))


@pytest.fixture(scope="module")
def by_name() -> dict[str, Case]:
    return {str(case): case for case in chain.from_iterable(table() for table in TABLES)}


@pytest.mark.parametrize("name", BY_COMMAND)
def test_a_command_says_one_line_and_leaves_nothing(name: str, by_name: dict[str, Case], tmp_path: Path) -> None:
    case = by_name[name]
    folder = put(case.files(), tmp_path / "input")
    if case.kind == "rows":
        put(whole("run"), tmp_path / "export")
    before = listing(tmp_path)
    command = [sys.executable, "-m", "retnet_tools", *COMMANDS[case.kind]]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode in CODES, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stdout == ""
    assert listing(tmp_path) == before
