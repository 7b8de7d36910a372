"""The table of planted faults fits the code as it is; `make mutants` plants them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from retnet_tools.progress import no_progress
from tests.trials.fault_table import KINDS, ROOT, Fault, TableError, missing_tests, read_table
from tests.trials.mutants import Tree, Trial, document

FAULTS = read_table()
SOURCE = "import time\n\ndef half(x):\n    return x / 2\n"
TESTS = """
from package import half
def test_four():
    assert half(4) == 2
def test_zero():
    assert half(0) == 0
def test_that_fails():
    assert half(1) == 1
"""


def test_every_row_stands_once_in_its_file_and_its_tests_exist() -> None:
    for fault in FAULTS:
        fault.plant(ROOT)
        assert missing_tests(fault) == [], fault


def test_there_are_faults_of_every_kind_and_no_two_alike() -> None:
    assert len(FAULTS) >= 60
    assert min(Counter(fault.kind for fault in FAULTS)[kind] for kind in KINDS) >= 2
    assert len({str(fault) for fault in FAULTS}) == len({(f.file, f.old, f.new) for f in FAULTS}) == len(FAULTS)


def row(new: str, *names: str, old: str = "x / 2", hang: bool = False) -> Fault:
    tests = tuple(f"test_package.py::{name}" for name in names)
    return Fault("package.py", "mathematics", f"{new} {names}", old, new, tests, hang)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "package.py").write_text(SOURCE)
    (tmp_path / "test_package.py").write_text(TESTS)
    return tmp_path


def test_a_fault_is_killed_or_survives_and_each_finds_the_file_whole(root: Path, tmp_path: Path) -> None:
    faults = [
        row("x / 3", "test_zero", "test_four"),
        row("x / 3", "test_zero"),
        row("x + 3", "test_that_fails"),
    ]
    with Tree(tmp_path / "tree", root, libraries=("pytest", "hypothesis")) as tree:
        found = list(Trial(faults, [tree], no_progress).found())
        assert (tree.folder / "package.py").read_text() == SOURCE
        hangs = row("time.sleep(99) if x else x", "test_four", hang=True)
        (hung,) = Trial([hangs], [tree], no_progress, timeout=lambda healthy: 1.0).found()
    assert [(one.outcome, one.by.partition("::")[2], one.noticed) for one in found] == [
        ("killed", "test_four", True),
        ("survived", "", False),
        ("broken", "test_that_fails", False),
    ]
    assert (hung.outcome, hung.noticed, replace(hung, fault=faults[0]).noticed) == ("timed out", True, False)
    counts = document([*found, hung], 9.87, "")
    assert (counts["planted"], counts["killed"], counts["survived"], counts["timed_out"]) == (4, 1, 1, 1)
    assert not counts["passed"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("x / 4", "x", "stands 0 times"),
        ("x", "y", "stands 2 times"),
        ("x / 2", "x  /  2", "says the same"),
    ],
)
def test_a_row_that_fits_the_code_no_more_is_an_error(root: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(TableError, match=message):
        row(new, "test_four", old=old).plant(root)


def test_a_test_that_does_not_exist_is_named(root: Path) -> None:
    fault = row("x / 3", "test_four", "test_five", "test_four[0]")
    assert missing_tests(fault, root) == ["test_package.py::test_five", "test_package.py::test_four[0]"]
