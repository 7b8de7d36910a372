import os

import pytest

from retnet_tools import machine
from retnet_tools.machine import available_memory, this_machine, torch_threads


def test_the_memory_of_this_machine_is_known() -> None:
    known = available_memory()
    assert known is None or 1 << 26 < known < 1 << 50


def test_this_machine_has_a_processor_cores_and_memory() -> None:
    machine = this_machine()
    assert machine.processor
    assert machine.system
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert machine.memory_bytes is None or machine.memory_bytes > 1 << 26


@pytest.mark.parametrize(
    ("parameters", "tokens", "cores", "threads"),
    [
        (4_200_000, 512, 64, 1),
        (4_200_000, 16 * 128, 64, 2),
        (178_000_000, 512, 2, 2),
        (178_000_000, 512, 64, 21),
        (1_300_000_000, 512, 64, 64),
        (1_300_000_000, 1, 64, 1),
    ],
)
def test_threads_follow_the_work_up_to_the_allowed_cores(
    parameters: int, tokens: int, cores: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "allowed_cores", lambda: cores)
    assert torch_threads(parameters, tokens) == threads


GROUP = "/sys/fs/cgroup/"
LIMITED = {
    "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n",
    GROUP + "memory.max": "5000000\n",
    GROUP + "memory.current": "4000000\n",
    GROUP + "memory.stat": "anon 900\ninactive_file 500000\nactive_file 7\n",
}
NESTED = {
    "/proc/self/cgroup": "4:memory:/old\n0::/a/b\n",
    GROUP + "a/memory.max": "3000000\n",
    GROUP + "a/memory.current": "2900000\n",
    GROUP + "a/b/memory.max": "max\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (LIMITED, 1_500_000),
        (LIMITED | {GROUP + "memory.max": "max\n"}, 8000 * 1024),
        (LIMITED | {GROUP + "memory.current": "6000000\n"}, 0),
        (LIMITED | NESTED, 100_000),
        (LIMITED | NESTED | {GROUP + "a/b/memory.max": "70\n"}, 70),
    ],
)
def test_a_container_has_what_it_does_not_use_yet(
    files: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file cache can be given up, and the tightest of nested limits holds."""
    monkeypatch.setattr(machine, "_text", lambda path: files.get(str(path), ""))
    assert available_memory() == expected
