"""The rows of the house: a module imports only from its own room or from rows above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import retnet_tools
from retnet_tools.cli.app import command_line_error
from tests.conftest import Run

PACKAGE = Path(retnet_tools.__file__).parent
ROWS = {
    "errors": 0,
    "version": 0,
    "fields": 0,
    "inputs": 0,
    "dtypes": 0,
    "file_records": 0,
    "disk": 0,
    "locks": 0,
    "replacing": 0,
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
    "": 9,
    "__main__": 9,
}
CALIBRATED = ("gptq", "gptq_run", "mixed", "sensitivity")
"""Modules of `quantize` that run the model, or torch itself."""
MODULES = sorted(PACKAGE.rglob("*.py"))


CHECKPOINT = PACKAGE / "data" / "shakespeare"
HELD_OUT = Path(__file__).parent.parent / "fixtures" / "shakespeare" / "heldout.txt"
NAMES = {
    ".".join(("retnet_tools", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in MODULES
}


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def module_room(file: Path) -> str:
    first = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports(file: Path, *, late: bool = True) -> Iterator[str]:
    """Every module that is imported, at the top, for types alone, and late, inside a function."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {part for function in functions for part in ast.walk(function)}
    for node in ast.walk(tree):
        if node in inside and not late:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            assert node.module is not None
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from {part if part in NAMES else node.module for part in parts}


def may_load_torch(module: str) -> bool:
    return room(module) in ("model", "bench") or module.removeprefix("retnet_tools.quantize.") in CALIBRATED


def test_no_arrow_runs_back() -> None:
    found = []
    for module, file in NAMES.items():
        own = room(module)
        assert own in ROWS, f"give {own} a row"
        for imported in imports(file):
            if imported.split(".")[0] != "retnet_tools":
                continue
            other = room(imported)
            assert other in ROWS, f"give {other} a row"
            if not (other == own or ROWS[other] < ROWS[own] or (ROWS[other] == ROWS[own] <= 1)):
                found.append(f"{module} (row {ROWS[own]}) imports {imported} (row {ROWS[other]})")
    assert found == []


def test_modules_import_one_another_in_no_circle() -> None:
    """Nor for types; a table may import one of its rows late."""
    arrows = {module: set(imports(file, late=False)) & NAMES.keys() for module, file in NAMES.items()}
    TopologicalSorter({module: names - {module} for module, names in arrows.items()}).prepare()


READERS = {
    "inputs": "the place",
    "locks": "its own files",
    "disk": "flushes",
    "machine": "the system's figures",
    "runtime.cuda": "the system's maps",
    "cli.app": "the null device",
    "evaluate.budget_file": "the package's own file, and a text that inputs has read",
    "graph.cuda_kernels": "the package's own file",
    "graph.genai": "a text that the tokenizers library made",
    "quantize.activations": "its own scratch file",
    "quantize.unfinished": "a stream that inputs has opened",
}
"""Who opens files to read, or parses JSON, and why; all else goes through `retnet_tools.inputs`. bench/ has its own."""
WRITERS = {"staging", "replacing", "disk", "locks"}
"""Who removes, renames and syncs what is on the disk."""
READING = {"json.loads", "json.load", "tomllib.loads", "tomllib.load", "np.load", "np.fromfile", "os.open"}
CHANGING = {f"os.{name}" for name in ("replace", "rename", "remove", "unlink", "fsync", "rmdir", "mkdir", "makedirs")}
CHANGING |= {"shutil.rmtree", "shutil.move", "shutil.copy", "shutil.copytree"}


def calls(file: Path) -> Iterator[tuple[str, str]]:
    """Called names, `json.loads`, and methods of whatever object with the first argument, `.open rb`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
            yield ast.unparse(node.func), f".{node.func.attr} {first}".strip()


def test_files_are_read_in_one_place() -> None:
    """A file from a stranger may be a pipe, a bomb or no UTF-8: one module knows that."""
    methods, found = {".read_text", ".read_bytes", ".open rb"}, set()
    for module, file in NAMES.items():
        if room(module) != "bench" and any(name in READING or method in methods for name, method in calls(file)):
            found.add(module.removeprefix("retnet_tools."))
    assert found <= READERS.keys() | {"__main__"}, found - READERS.keys()


def test_what_is_on_the_disk_is_changed_in_one_place() -> None:
    methods, found = (
        {".unlink", ".rmdir", ".mkdir", ".touch", ".symlink_to", ".hardlink_to", ".open wb", ".open ab"},
        {},
    )
    for module, file in NAMES.items():
        for name, method in calls(file):
            if room(module) != "bench" and (name in CHANGING or method in methods):
                found.setdefault(module.removeprefix("retnet_tools."), set()).add(name)
    streams = {
        "graph.folder",
        "quantize.activations",
        "quantize.unfinished",
        "formats.safetensors_files",
        "runtime.bulk",
    }
    for module in streams & found.keys():
        # They write to the path that staging gave them.
        assert all(name.endswith(".open") for name in found.pop(module)), module
    assert found.keys() <= WRITERS, found


SAME_MEANING = {"log_decay"}
"""Of torch and of graphs."""


def test_a_name_that_leaves_its_room_has_one_meaning() -> None:
    """But for a command and a job of one name, and what is the same in two rooms that do not know each other."""
    homes: dict[str, set[str]] = {}
    for module, file in NAMES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.module not in NAMES or room(node.module) == room(module):
                continue
            defined = set(definitions(NAMES[node.module]))
            for name in {alias.name for alias in node.names} & defined:
                homes.setdefault(name, set()).add(node.module)
    twice = {name: modules for name, modules in homes.items() if len(modules) > 1 and name not in SAME_MEANING}
    assert twice == {}


def definitions(file: Path) -> Iterator[str]:
    """The names that a module defines at its top."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))


def test_only_the_modules_that_may_import_torch_do() -> None:
    importing = [module for module in NAMES if any(name.split(".")[0] == "torch" for name in imports(NAMES[module]))]
    assert [module for module in importing if not may_load_torch(module)] == []


def test_importing_the_others_does_not_load_torch_by_way_of_another() -> None:
    others = [module for module in NAMES if not may_load_torch(module) and not module.endswith("__main__")]
    code = (
        "import importlib, sys\n"
        f"for module in {others!r}:\n"
        "    importlib.import_module(module)\n"
        "    assert 'torch' not in sys.modules, module\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr.splitlines()[-1]


HEAVY = ("torch", "onnx_ir", "sympy", "tokenizers", "onnxruntime")
"""What is imported when it is used, and not before."""


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("retnet_tools.cli.app", ("torch", "onnxruntime", "onnx_ir", "tokenizers")),
        ("retnet_tools.formats", ("torch", "onnxruntime")),
        # An export's first token waits for no more than runs it: onnx_ir alone takes half a second.
        ("retnet_tools.runtime.session", HEAVY),
        ("retnet_tools.runtime.decoder", HEAVY),
        ("retnet_tools.runtime.state_file", HEAVY),
        ("retnet_tools.evaluate.logits", HEAVY),
        ("retnet_tools.reports.generation", HEAVY),
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


WAY = (
    "cli jobs quantize graph "  # the request, which is checked as it is made
    "jobs formats quantize graph quantize tokenizing evaluate quantize evaluate "
    "reports graph"
)


@cache
def file_room(name: str) -> str:
    return module_room(Path(name)) if PACKAGE in Path(name).parents else "elsewhere"


class Way:
    """The rooms that a command goes through: whom its orchestration (cli, jobs) calls, in order.

    Counted are calls of functions and makings of objects, not what is asked of an object that one has been given, nor
    ground; calls into one room one after another are one move.
    """

    def __init__(self) -> None:
        self.rooms, self.back = ["cli", "jobs"], set[str]()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """A profiler, of the calls of modules' own functions."""
        called, caller = (self._room(part) for part in (frame, frame.f_back))
        if event != "call" or called == caller or ROWS.get(caller, 0) == 0 or ROWS.get(called, 0) == 0:
            return
        if ROWS[called] >= ROWS["jobs"] and ROWS[caller] < ROWS["jobs"]:
            self.back.add(f"{caller} calls {frame.f_code.co_qualname} of {called}")
        name = frame.f_code.co_qualname.removesuffix(".__init__")
        if caller in ("cli", "jobs") and name.isidentifier() and called != self.rooms[-1]:
            self.rooms.append(called)

    @staticmethod
    def _room(frame: FrameType | None) -> str:
        return (
            "elsewhere" if frame is None or frame.f_code.co_name == "<module>" else file_room(frame.f_code.co_filename)
        )


def test_the_longest_way_through_export_is_short_and_never_leads_back_up(cli: Run, tmp_path: Path) -> None:
    """Of a checkpoint that is quantized, and measured on a text."""
    cli("export", CHECKPOINT, "--dry-run", "--quantize", "int4")  # imports
    options = ("--quantize", "int4", "--text", HELD_OUT, "--text-tokens", 300)
    way = Way()
    sys.setprofile(way)
    try:
        result = cli("export", CHECKPOINT, "-o", tmp_path / "out", *options)
    finally:
        sys.setprofile(None)
    assert result.exit_code == 0
    assert way.back == set()
    assert " ".join(way.rooms) == WAY
    assert len(way.rooms) - 1 <= 15
