import os
import signal

# ONNX Runtime and onnxruntime-genai report to Microsoft by default; they read this when they are loaded.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# Nothing that a test opens is kept for later, by the processes that it starts neither.
os.environ["RETNET_TOOLS_CACHE"] = "off"
# Tests run beside each other, and so do the processes that they start: a test that wants more threads says so.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings

from retnet_tools import console, machine
from retnet_tools.cli import app

torch.set_num_threads(1)
machine.allowed_cores = lambda: 1
# What a test says of colours and widths is what it gets, on any terminal.
for variable in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PY_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(variable, None)
# A shell starts what runs in the background with SIGINT ignored, and so would be the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# `nohup` ignores SIGHUP: so do these tests then, and not what they start, which takes no handler along.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)
# How long an example takes says how busy the machine is.
settings.register_profile("anywhere", derandomize="CI" in os.environ, deadline=None)
settings.load_profile("anywhere")


@dataclass(frozen=True)
class Result:
    exit_code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def scripts(monkeypatch) -> Callable[[str], ModuleType]:
    """Imports a script of benchmarks/, which import each other by their names alone."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def cli(monkeypatch, capsys) -> Iterator[Run]:
    """Run `retnet-tools` in this process, with the error handling of its entry point, which owns a process: what it
    sets there is set back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    level = console.LOG.level
    for owner, name in ((warnings, "showwarning"), (console.LOG, "handlers"), (console.LOG, "propagate")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")

    def run(*arguments: object) -> Result:
        monkeypatch.setattr("sys.argv", ["retnet-tools", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            app.main()
        out, err = capsys.readouterr()
        return Result(stop.value.code or 0, out, err)

    yield run
    console.LOG.setLevel(level)
    for number, handler in handlers.items():
        signal.signal(number, handler)
