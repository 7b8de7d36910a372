"""The rows of the house: a module imports only from its own room or from rows above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import retnet_tools
from retnet_tools.cli.app import command_line_error

PACKAGE = Path(retnet_tools.__file__).parent
ROWS = {
    "": 0,
    "errors": 0,
    "fields": 0,
    "dtypes": 0,
    "staging": 0,
    "machine": 0,
    "console": 0,
    "progress": 0,
    "plotting": 0,
    "config": 1,
    "paper": 1,
    "weights": 1,
    "random_weights": 1,
    "distributions": 1,
    "tokenizing": 1,
    "formats": 2,
    "model": 3,
    "graph": 3,
    "quantize": 4,
    "runtime": 4,
    "evaluate": 5,
    "jobs": 6,
    "bench": 6,
    "reports": 7,
    "cli": 8,
}
TORCH_FILES = {"quantize/gptq.py", "bench/torch_decoder.py"}
TORCH_ROOMS = {"model"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            assert node.module is not None
            yield node.module
            if node.module == "retnet_tools":
                yield from (f"retnet_tools.{a.name}" for a in node.names if a.name in ROWS)


def module_room(file: Path) -> str:
    first = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_arrow_runs_back(file: Path) -> None:
    own = module_room(file)
    assert own in ROWS, f"give {own} a row"
    for imported in imports(file):
        if imported.split(".")[0] != "retnet_tools":
            continue
        other = room(imported)
        assert other in ROWS, f"give {other} a row"
        allowed = other == own or ROWS[other] < ROWS[own] or (ROWS[other] == ROWS[own] <= 1)
        assert allowed, f"{own} (row {ROWS[own]}) imports {imported} (row {ROWS[other]})"


def test_nothing_imports_the_bench_but_its_command() -> None:
    outside = [file for file in MODULES if module_room(file) != "bench"]
    users = [file.relative_to(PACKAGE).as_posix() for file in outside if "bench" in map(room, imports(file))]
    assert users == ["cli/bench.py"]


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_only_the_rooms_that_may_import_torch_do(file: Path) -> None:
    if module_room(file) in TORCH_ROOMS or file.relative_to(PACKAGE).as_posix() in TORCH_FILES:
        return
    assert not any(name.split(".")[0] == "torch" for name in imports(file))


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("retnet_tools.cli.app", ("torch", "onnxruntime", "onnx_ir", "tokenizers")),
        ("retnet_tools.formats", ("torch", "onnxruntime")),
    ],
)
def test_import_stays_light(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


def test_typer_is_used_by_its_top_level_and_the_classes_it_documents_alone() -> None:
    """Its modules, and which of its errors are click's, change from version to version."""
    names = {name for file in MODULES for name in imports(file)}
    assert "typer" in names
    assert [name for name in names if name.startswith(("typer.", "click"))] == ["typer.core"]


@pytest.mark.parametrize("library", ["typer", "click"])
def test_the_root_of_command_line_errors_is_found_in_any_version(library: str) -> None:
    kind = pytest.importorskip(library).BadParameter
    root, error = command_line_error(kind), kind("wrong")
    assert root.__base__ is Exception
    assert isinstance(error, root)
    assert (error.format_message(), error.exit_code) == ("Invalid value: wrong", 2)
