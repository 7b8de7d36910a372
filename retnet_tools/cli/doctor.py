"""`retnet-tools doctor`: what this machine can run, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retnet_tools.cli import options
from retnet_tools.errors import ProviderError, RetNetToolsError


def doctor(
    folder: Annotated[
        Path | None, typer.Argument(help="Exported folder: show where its graphs run.", show_default=False)
    ] = None,
    device: options.DeviceName = "cpu",
    self_test: Annotated[
        bool, typer.Option("--self-test/--no-self-test", help="Run a small model and compare it with float64.")
    ] = True,
    as_json: options.Json = False,
) -> None:
    """Show versions, libraries and devices, and test them.

    Exit code 4 where the device that was asked for cannot be used, 1 where the self-test fails.
    """
    from retnet_tools.console import print_json
    from retnet_tools.reports.diagnosis import diagnosis_document, render_diagnosis
    from retnet_tools.runtime.diagnosis import device_problem, diagnose, diagnose_folder, usable_devices
    from retnet_tools.runtime.providers import parse_device
    from retnet_tools.runtime.selftest import run_selftest

    target = parse_device(device)
    diagnosis, problem = diagnose(), device_problem(target)
    placements = None if folder is None else diagnose_folder(folder, target)
    tests = run_selftest(usable_devices(target)) if self_test else None
    document = diagnosis_document(diagnosis, placements, tests, target, problem)
    print_json(document) if as_json else render_diagnosis(document)
    if problem is not None:
        raise ProviderError(f"{target} cannot be used ({problem})")
    if document["self_test_passed"] is False:
        raise RetNetToolsError("the self-test failed", "logits as float64 has them", "see the report")
