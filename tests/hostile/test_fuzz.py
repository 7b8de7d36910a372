"""A short run of the fuzzers of `tests.trials.fuzz`; `make fuzz` is the long one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trials.fuzz_bytes import BYTES, run_bytes, seeds
from tests.trials.fuzz_documents import DOCUMENTS, fuzz_documents

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pipes and address limits are those of Linux")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_changed_documents_are_read_or_refused(name: str) -> None:
    assert fuzz_documents(name, 0.2, 0, examples=15) >= 1


@pytest.mark.parametrize("name", BYTES)
def test_seeds_are_whole_and_cut_ones_are_refused_or_read(name: str) -> None:
    for data in seeds(name):
        run_bytes(name, data)
        for size in range(0, len(data), 1 + len(data) // 40):
            run_bytes(name, data[:size])


def test_changed_bytes_are_read_or_refused(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed: pip install -e '.[fuzz]'")
    command = [sys.executable, "-m", "tests.trials.fuzz", "--target", "mixed", "--minutes", "0.1", "--seed", "1"]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    result = subprocess.run(
        [*command, "--keep", str(tmp_path)], cwd=root, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    runs = re.search(r"mixed: seed 1, (\d+) inputs", result.stdout)
    assert runs is not None
    assert int(runs[1]) > 10
