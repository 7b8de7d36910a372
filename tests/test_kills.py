"""A few trials of `tests.trials.kills`, which says more; `make kills` runs two hundred."""

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")
def test_killed_commands_and_full_disks_leave_outputs_whole_or_absent() -> None:
    command = [sys.executable, "-m", "tests.trials.kills", "--kills", "10", "--disks", "5", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 kills and 5 disks, seed 3: 0 failures" in done.stdout
    assert " killed, " in done.stdout
