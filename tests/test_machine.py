import os

from retnet_tools.machine import available_memory, this_machine


def test_the_memory_of_this_machine_is_known() -> None:
    known = available_memory()
    assert known is None or 1 << 26 < known < 1 << 50


def test_this_machine_has_a_processor_cores_and_memory() -> None:
    machine = this_machine()
    assert machine.processor
    assert machine.system
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert machine.memory_bytes is None or machine.memory_bytes > 1 << 26
