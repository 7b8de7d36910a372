"""What `doctor` reports."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from retnet_tools.console import ResultTable, print_line, result_console, verdict
from retnet_tools.graph.cuda_kernels import kernel_version
from retnet_tools.runtime.diagnosis import Diagnosis, FolderDiagnosis
from retnet_tools.runtime.providers import Device, parse_device
from retnet_tools.runtime.selftest import SelfTest

SCHEMA_VERSION = 1


def diagnosis_document(
    diagnosis: Diagnosis,
    folder: FolderDiagnosis | None,
    tests: Sequence[SelfTest] | None,
    device: Device,
    problem: str | None,
) -> dict[str, Any]:
    """Everything as one JSON document.

    Args:
        tests: None where the self-test was left out.
        problem: why the device that was asked for cannot be used; None where it can.
    """
    passed = None if tests is None else all(test.passed for test in tests)
    return {
        "schema_version": SCHEMA_VERSION,
        "device": str(device),
        "usable": problem is None,
        "problem": problem,
        **asdict(diagnosis),
        "telemetry_disabled": os.environ.get("ORT_DISABLE_TELEMETRY") == "1",
        "folder": None if folder is None else asdict(folder),
        "self_test": None if tests is None else [{**asdict(test), "passed": test.passed} for test in tests],
        "self_test_passed": passed,
    }


def render_diagnosis(document: dict[str, Any]) -> None:
    """The same for people."""
    console = result_console()
    for name, text in (("python", document["python"]), ("system", document["system"])):
        print_line(console, f"{name:<12} {text}")
    versions = [f"{name} {version}" for name, version in document["packages"].items() if version]
    print_line(console, f"{'packages':<12} {', '.join(versions)}")
    providers = ", ".join(document["providers"])
    used = f"{document['onnxruntime']} in {document['onnxruntime_path']}: {providers}"
    print_line(console, f"{'onnxruntime':<12} {used}")
    for name in ("clash", "stray"):
        if document[name]:
            print_line(console, f"{name:<12} {document[name]}")
    print_line(console, f"{'telemetry':<12} {'off' if document['telemetry_disabled'] else 'as onnxruntime has it'}")
    kept, size = document["packed_folder"], document["packed_bytes"]
    print_line(console, f"{'kept packed':<12} {f'{size / 1e9:.2f} GB in {kept}' if kept else 'off'}")
    _render_cuda(console, document)
    if document["folder"] is not None:
        _render_folder(console, document["folder"])
    for test in document["self_test"] or ():
        _render_test(console, test)
    word = "usable" if document["usable"] else f"not usable: {document['problem']}"
    print_line(console, f"{document['device']:<12} {word}")


def _render_cuda(console: Console, document: dict[str, Any]) -> None:
    if document["driver_cuda"] is None:
        print_line(console, f"{'driver':<12} none")
    else:
        print_line(console, f"{'driver':<12} for CUDA up to {document['driver_cuda']}")
    for name, path in document["libraries"].items():
        print_line(console, f"{'library':<12} {name}: {path or 'missing'}")
    for row in document["devices"]:
        device, free = row["device"], row["free_bytes"]
        memory = f"{device['memory_bytes'] / 1e9:.1f} GB"
        memory += "" if free is None else f", {free / 1e9:.1f} GB free"
        capability = ".".join(map(str, device["capability"]))
        name = f"cuda:{device['index']}"
        print_line(console, f"{name:<12} {device['name']}, compute capability {capability}, {memory}")


def _render_folder(console: Console, folder: dict[str, Any]) -> None:
    predicted = any(graph["predicted"] for graph in folder["graphs"])
    basis = f", predicted from the kernels of onnxruntime {kernel_version()}" if predicted else ""
    print_line(console, f"{'folder':<12} {folder['path']}: {folder['dtype']}, for {folder['made_for']}{basis}")
    table = ResultTable("graph", "nodes", "on the CPU, and not for shapes", "weights")
    for graph in folder["graphs"]:
        nodes = ", ".join(f"{provider} {count}" for provider, count in graph["nodes"].items())
        on_cpu = ", ".join(f"{operator} ({count})" for operator, count in graph["on_cpu"].items()) or "none"
        table.add_row(graph["name"], nodes or "not opened", on_cpu, f"{graph['weight_bytes'] / 1e6:.1f} MB")
    console.print(table)
    for graph in folder["graphs"]:
        if graph["problem"]:
            print_line(console, f"{graph['name']:<12} {graph['problem']}")
    print_line(console, f"{'memory':<12} about {folder['needed_bytes'] / 1e9:.2f} GB on a GPU, for one sequence")


def _render_test(console: Console, test: dict[str, Any]) -> None:
    steps = "captured" if test["eager_reason"] is None else "kernel by kernel"
    if parse_device(test["device"]).provider.in_place:
        steps = "in place"
    found = f"prefill {test['prefill_error']:.1e}, steps ({steps}) {test['step_error']:.1e} from float64"
    console.print(f"{'self-test':<12} {test['device']}: {verdict(test['passed'])}, {found}, {test['seconds']:.1f} s")
    if test["problem"]:
        print_line(console, f"{'':<12} {test['problem']}")
