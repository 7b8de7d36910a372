"""Signals: a program that is asked to end does so at once, in silence, with 128 and the signal's number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of one process to itself")

SCRIPT = """
import importlib.abc, os, signal, sys

module, number, ignored, *words = sys.argv[1:]
number = int(number)

class Interrupted(importlib.abc.MetaPathFinder):
    '''Sends a signal while a module is imported, and makes an ImportError of what comes of it, as numpy does.'''

    def find_spec(self, name, path=None, target=None):
        if name != module:
            return None
        try:
            os.kill(os.getpid(), number)
            for _ in range(1000):
                pass
        except BaseException as error:
            raise ImportError("something failed to import") from error

sys.meta_path.insert(0, Interrupted())
if ignored == "True":
    signal.signal(number, signal.SIG_IGN)
sys.argv[1:] = words
from retnet_tools.__main__ import main
main()
"""
LOOK = ("inspect", "-q", "--quick", "fixtures/shakespeare")


def run(module: str, number: int, *, ignored: bool = False) -> subprocess.CompletedProcess[str]:
    """A command line in a process that gets a signal while it imports a module."""
    words = [sys.executable, "-c", SCRIPT, module, str(int(number)), str(ignored), *LOOK]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("module", ["typer", "retnet_tools.cli.verify", "rich.console"])
def test_an_interrupt_while_modules_are_imported_ends_in_silence(module: str) -> None:
    """Before the commands are there, and in the middle of one."""
    result = run(module, signal.SIGINT)
    assert (result.returncode, result.stdout, result.stderr) == (128 + signal.SIGINT, "", "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_other_signals_inside_an_import_do_too(name: str) -> None:
    number = getattr(signal, name)
    result = run("rich.console", number)
    assert (result.returncode, result.stdout, result.stderr) == (128 + number, "", "")


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_what_the_caller_ignores_is_ignored(name: str) -> None:
    """nohup and shells that start something in the background do."""
    result = run("rich.console", getattr(signal, name), ignored=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_stdout_that_is_full_is_an_error_in_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    for words in (LOOK, (*LOOK, "--json")):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "retnet_tools", *words]
            result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert (result.returncode, result.stderr) == (1, f"error: {os.strerror(28)}\n")
