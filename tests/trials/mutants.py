"""Plants faults in a copy of the repository, one at a time, and runs the tests that own the file: each must be noticed.

    python -m tests.trials.mutants [--only REGEX] [--file PATH] [--jobs N] [--list] [--json]

Each set of tests first has to pass without a fault. A fault is killed by a test that fails, and survives where all
pass; it times out where they do not end. The exit code is 1 unless every fault is killed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from typing import Literal, get_args

from retnet_tools.console import LOG, print_json, progress_bar
from retnet_tools.progress import Progress
from tests.trials.fault_table import ROOT, Fault, TableError, missing_tests, read_table

LEFT_OUT = shutil.ignore_patterns(
    *(".git", ".venv", "*_cache", ".hypothesis", "__pycache__", "*.egg-info", "out", "build", "dist")
)
LIBRARIES = (
    "numpy",
    "torch",
    "onnxruntime",
    "onnx.reference",
    "onnx_ir",
    "hypothesis",
    "tokenizers",
    "typer",
    "pytest",
)
"""Loaded once for all runs."""
SURROUNDINGS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "CI": "1"}
"""One thread; hypothesis draws the same examples each time."""
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-rfE", "--tb=line", "--color=no")
"""Not the project's own ones: they change, and are for people."""
HEALTHY_TIMEOUT = 1200.0
_PASSED, _FAILED = 0, 1

Outcome = Literal["killed", "survived", "timed out", "broken"]


@dataclass(frozen=True)
class Run:
    """A run of pytest: its exit code, None where it did not end; seconds; the first test that failed; what it wrote."""

    code: int | None
    seconds: float
    failed: str
    output: str


@dataclass(frozen=True)
class Found:
    """What became of a fault.

    Attributes:
        outcome: `broken` where its tests could not be run, or do not pass without it.
        by: the test that noticed, or what went wrong.
    """

    fault: Fault
    outcome: Outcome
    seconds: float
    by: str

    @property
    def noticed(self) -> bool:
        """Whether the table is satisfied with it."""
        return self.outcome == "killed" or (self.outcome == "timed out" and self.fault.hang)


class Tree:
    """A copy of the repository in which one fault at a time is planted; a context."""

    def __init__(self, folder: Path, root: Path = ROOT, libraries: Sequence[str] = LIBRARIES) -> None:
        self.folder, self._output = folder, folder.with_suffix(".txt")
        shutil.copytree(root, folder, ignore=LEFT_OUT, symlinks=True)
        environment = {**os.environ, **SURROUNDINGS, "PYTHONPATH": str(folder)}
        self._pytest = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("warm_pytest.py"), *libraries],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        self._pytest.kill()
        self._pytest.communicate()

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        """The tree with a fault in it."""
        path = self.folder / fault.file
        whole, changed = path.read_bytes(), fault.plant(self.folder)
        # Compiled code is known by the second and the size of its source, which a fault may leave as they are.
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            compiled.unlink()
        path.write_text(changed, encoding="utf-8")
        try:
            yield
        finally:
            path.write_bytes(whole)

    def run(self, tests: Sequence[str], timeout: float, *, compiled: bool) -> Run:
        """Run tests up to the first that fails; `compiled` keeps the compiled code of what is imported."""
        began = time.perf_counter()
        order = {"arguments": [*OPTIONS, *tests], "output": str(self._output), "timeout": timeout, "compiled": compiled}
        assert self._pytest.stdin is not None
        assert self._pytest.stdout is not None
        self._pytest.stdin.write(json.dumps(order) + "\n")
        self._pytest.stdin.flush()
        code, seconds = json.loads(self._pytest.stdout.readline()), time.perf_counter() - began
        output = self._output.read_text(encoding="utf-8", errors="replace")
        failed = re.search(r"^(?:FAILED|ERROR) (\S+?::\w+|\S+)", output, re.MULTILINE)
        return Run(code, seconds, failed[1] if failed else "", output)


class Trial:
    """Faults that are tried in several trees beside each other.

    Args:
        progress: called with what runs, the steps done and the steps in all.
        timeout: seconds that tests may take with a fault, by those that they take without.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        trees: Sequence[Tree],
        progress: Progress,
        timeout: Callable[[float], float] = lambda healthy: max(60.0, 5 * healthy),
    ) -> None:
        self._faults, self._progress, self._timeout = faults, progress, timeout
        self._trees: Queue[Tree] = Queue()
        for tree in trees:
            self._trees.put(tree)
        self._sets = {fault.tests: threading.Lock() for fault in faults}
        self._healthy: dict[tuple[str, ...], Run] = {}
        self._lock, self._done = threading.Lock(), 0
        self._jobs = len(trees)

    def found(self) -> Iterator[Found]:
        """What became of each fault, in the order of the table."""
        with ThreadPoolExecutor(self._jobs) as pool:
            yield from pool.map(self._try, self._faults)

    def _try(self, fault: Fault) -> Found:
        with self._sets[fault.tests]:
            if fault.tests not in self._healthy:
                with self._tree(f"without a fault: {fault.tests[0]}") as tree:
                    self._healthy[fault.tests] = tree.run(fault.tests, HEALTHY_TIMEOUT, compiled=True)
        healthy = self._healthy[fault.tests]
        if healthy.code != _PASSED:
            return Found(fault, "broken", healthy.seconds, f"without the fault: {_reason(healthy)}")
        with self._tree(str(fault)) as tree, tree.planted(fault):
            run = tree.run(fault.tests, self._timeout(healthy.seconds), compiled=False)
        outcomes: dict[int | None, Outcome] = {_PASSED: "survived", _FAILED: "killed", None: "timed out"}
        return Found(fault, outcomes.get(run.code, "broken"), run.seconds, _reason(run))

    @contextmanager
    def _tree(self, what: str) -> Iterator[Tree]:
        tree = self._trees.get()
        self._progress(what, self._done, len(self._sets) + len(self._faults))
        try:
            yield tree
        finally:
            self._trees.put(tree)
            with self._lock:
                self._done += 1


def _reason(run: Run) -> str:
    """The test that failed, or how the run ended."""
    if run.failed or run.code in (_PASSED, None):
        return run.failed
    return f"pytest ended with {run.code}: {(run.output.strip().splitlines() or [''])[-1]}"


def chosen(only: str, file: str) -> list[Fault]:
    """The rows that are asked for, once every row of the table is found to fit the code.

    Raises:
        TableError: one does not, or none is chosen.
    """
    faults = read_table()
    for fault in faults:
        fault.plant(ROOT)
        if missing := missing_tests(fault):
            raise TableError(f"{fault}: no test {missing[0]}: mend the row")
    found = [fault for fault in faults if re.search(only, str(fault)) and file in ("", fault.file)]
    if not found:
        raise TableError(f"no fault of {len(faults)} is chosen: --list shows them")
    return found


def document(found: Sequence[Found], seconds: float, command: str) -> dict[str, object]:
    """The JSON document of a trial."""
    counts = Counter(one.outcome for one in found)
    return {
        "schema_version": 1,
        "command": command,
        "planted": len(found),
        **{name.replace(" ", "_"): counts[name] for name in get_args(Outcome)},
        "seconds": round(seconds, 1),
        "passed": all(one.noticed for one in found),
        "faults": [
            {**asdict(one.fault), "outcome": one.outcome, "seconds": round(one.seconds, 1), "by": one.by}
            for one in found
        ],
    }


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description="plant faults, and see whether tests notice")
    parser.add_argument("--only", default="", metavar="REGEX", help="faults in whose line of --list this is found")
    parser.add_argument("--file", default="", metavar="PATH", help="faults of this file")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="runs beside each other")
    parser.add_argument("--list", action="store_true", help="show the faults and run nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    LOG.setLevel(logging.INFO)
    try:
        faults = chosen(options.only, options.file)
    except TableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.list:
        print("\n".join(map(str, faults)))
        return 0
    began, found = time.perf_counter(), list[Found]()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mutants-")))
        progress = stack.enter_context(progress_bar())
        trees = [stack.enter_context(Tree(folder / str(number))) for number in range(options.jobs)]
        for one in Trial(faults, trees, progress).found():
            found.append(one)
            if not options.json:
                print(f"{one.outcome:9} {one.seconds:6.1f} s  {one.fault}  {one.by}", flush=True)
    result = document(found, time.perf_counter() - began, " ".join(sys.argv[1:]))
    if options.json:
        print_json(result)
    else:
        counts = ", ".join(f"{result[name.replace(' ', '_')]} {name}" for name in get_args(Outcome))
        print(f"{result['planted']} faults planted: {counts}, in {result['seconds']} s")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
