"""Where the time of a step goes, by operator, from ONNX Runtime's own profile."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from retnet_tools.bench.models import Model
from retnet_tools.bench.options import WARM_UP_STEPS, BenchOptions, Case
from retnet_tools.bench.results import OperatorTime, StepProfile
from retnet_tools.bench.specs import RetNetSpec
from retnet_tools.bench.worker import Worker
from retnet_tools.runtime.providers import Device

PROFILED_STEPS = 16
CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})
"""Operators whose time contains that of the nodes in their subgraphs, which have events of their own."""
Event = dict[str, Any]


def measure_profile(model: Model, options: BenchOptions, device: Device, scratch: Path) -> StepProfile:
    """Profile steps of the first batch size, depth and number of threads, in a session of its own."""
    test = Case("decode", PROFILED_STEPS, options.depths[0], options.batches[0])
    threads = options.threads[0]
    spec = RetNetSpec(model.folder, device, threads, options.chunk_size, profile=scratch / "profile")
    with Worker("retnet", spec) as worker:
        file = Path(worker.call("profile", test))
        ran_on = worker.call("device").kind
    ms, operators = operator_times(json.loads(file.read_text(encoding="utf-8")), skip=WARM_UP_STEPS)
    outside = ms - sum(operator.ms for operator in operators)
    return StepProfile(test.name, test.batch, threads, ran_on, ms, outside, operators)


def operator_times(events: list[Event], *, skip: int) -> tuple[float, tuple[OperatorTime, ...]]:
    """ms of a step, and time by operator, most first. A node counts without the time of those in its subgraphs.

    Args:
        events: of a profile.
        skip: steps at the start that do not count.
    """
    runs = sorted((event["ts"], event["dur"]) for event in events if event.get("name") == "model_run")
    counted = runs[skip:]
    whole = sum(duration for _, duration in counted)
    microseconds: defaultdict[str, int] = defaultdict(int)
    calls: defaultdict[str, int] = defaultdict(int)
    nodes = [
        event
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= counted[0][0]
    ]
    for event, own in zip(nodes, own_times(nodes), strict=True):
        microseconds[event["args"]["op_name"]] += own
        calls[event["args"]["op_name"]] += 1
    return whole / len(counted) / 1e3, tuple(
        OperatorTime(name, calls[name] / len(counted), time / len(counted) / 1e3, time / whole if whole else 0.0)
        for name, time in sorted(microseconds.items(), key=lambda item: -item[1])
    )


def own_times(nodes: list[Event]) -> list[int]:
    """Microseconds of each node without those of the nodes that ran inside it, which only control flow has.

    Nodes run one after another, so one that begins before another has ended is inside it.
    """
    own = [int(node["dur"]) for node in nodes]
    around: list[int] = []
    # A node in a subgraph may begin in the microsecond in which the one around it does.
    for i in sorted(range(len(nodes)), key=lambda i: (nodes[i]["ts"], -nodes[i]["dur"])):
        while around and nodes[i]["ts"] >= nodes[around[-1]]["ts"] + nodes[around[-1]]["dur"]:
            around.pop()
        if around:
            # Times are whole microseconds: the parts may be one more than the whole.
            own[around[-1]] = max(0, own[around[-1]] - nodes[i]["dur"])
        if nodes[i]["args"]["op_name"] in CONTROL_FLOW:
            around.append(i)
    return own
