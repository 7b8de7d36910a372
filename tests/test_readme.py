"""What README shows works as it stands: its Python runs, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from retnet_tools.formats import open_checkpoint
from retnet_tools.graph.export import plan_export, write_export
from retnet_tools.graph.targets import TARGETS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^(?:\$ )?retnet-tools ([a-z]+)((?: [^\n]*)?)$", README, re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shipped checkpoint's exports in it, under the names that README gives them."""
    folder, checkpoint = tmp_path_factory.mktemp("readme"), open_checkpoint(ROOT / "fixtures" / "shakespeare")
    for target in TARGETS:
        plan = plan_export(checkpoint, dtype="float32", ops="fused", target=target)
        write_export(plan, folder / f"ckpt-{target}", force=False, progress=lambda count: None)
    return folder


@pytest.mark.parametrize("code", PYTHON, ids=[f"block{i}" for i in range(len(PYTHON))])
def test_its_python_runs(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    if "onnxruntime_genai" in code:
        pytest.importorskip("onnxruntime_genai")
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip()


def test_there_is_python_and_there_are_commands() -> None:
    assert PYTHON
    assert {"verify", "export", "generate", "inspect", "state"} <= {name for name, _ in COMMANDS}


@pytest.mark.parametrize(("command", "options"), sorted(set(COMMANDS)), ids=str)
def test_its_commands_and_their_options_exist(command: str, options: str, cli) -> None:
    words = re.split(r"\s", re.sub(r"'[^']*'", "''", options))
    flags = {word for word in words if word.startswith("--")}
    sub = next((word for word in words if command == "state" and word.isalpha()), None)
    text = cli(command, *([sub] if sub else []), "--help").out
    assert text.startswith("Usage: ")
    assert all(flag in text for flag in flags)
