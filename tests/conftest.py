import os
import signal

# ONNX Runtime and onnxruntime-genai report to Microsoft by default; they read this when they are loaded.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings

from retnet_tools import machine
from retnet_tools.cli import app

# Tests run beside each other: a test that wants more threads says so.
torch.set_num_threads(1)
machine.allowed_cores = lambda: 1
# A shell starts what runs in the background with SIGINT ignored, and so would be the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")


@dataclass(frozen=True)
class Result:
    exit_code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch, capsys) -> Run:
    """Run `retnet-tools` in this process, with the error handling of its entry point."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr("sys.argv", ["retnet-tools", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            app.main()
        out, err = capsys.readouterr()
        return Result(stop.value.code or 0, out, err)

    return run
