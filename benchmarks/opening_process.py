"""The work of the processes of `opening.py`, of whatever tree of this repository stands in PYTHONPATH.

    python benchmarks/opening_process.py REQUEST

REQUEST is a JSON object: `{"write": KIND, "size", "folder"}` exports a random model; `{"model": FOLDER, "threads",
"prompt", "steps"}` opens one, reads a prompt and makes steps, and then waits for its stdin to end, so that another
process can be measured beside it. It answers with a line of JSON.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

FIRST_TOKENS = 8
"""Of the short prompt."""
WARM_UP = 3
VOCABULARY = 50000
"""Token ids are below it in all published sizes."""
_OPEN: list[Any] = []
"""What stays open while the process waits."""


def write(request: dict[str, Any]) -> dict[str, Any]:
    """Export a model; seconds, and bytes of its weights."""
    from large_checkpoint import write_exports

    began, kind = time.perf_counter(), request["write"]
    sizes = write_exports(Path(request["folder"]), request["size"], "fused", (kind,))
    return {"seconds": time.perf_counter() - began, "weight_bytes": sizes[kind]}


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds and bytes of one process: opening, a short prompt, a long one and steps."""
    import numpy as np

    from retnet_tools.runtime.providers import Device
    from retnet_tools.runtime.session import DecoderSession

    began = time.perf_counter()
    session = DecoderSession(request["model"], Device("cpu"), request["threads"], prompts=True)
    session.open_prefill()
    opened = time.perf_counter()
    _OPEN.append(session)
    found: dict[str, Any] = {"opening_seconds": opened - began}
    count = request["prompt"]
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (1, FIRST_TOKENS + 2 * count))
    state = session.new_state(1)
    session.prefill(ids[:, :FIRST_TOKENS], state).argmax()
    # Once to warm up, in the shape of what is timed.
    session.prefill(ids[:, FIRST_TOKENS : FIRST_TOKENS + count], state)
    began = time.perf_counter()
    token = session.prefill(ids[:, FIRST_TOKENS + count :], state).argmax(axis=-1)
    found["prompt_tokens_per_second"] = count / (time.perf_counter() - began)
    seconds = []
    for _ in range(WARM_UP + request["steps"]):
        began = time.perf_counter()
        logits = session.step(token, state)
        token = np.asarray(logits).argmax(axis=-1)
        seconds.append(time.perf_counter() - began)
    return found | {"ms_per_token": 1e3 * statistics.median(seconds[WARM_UP:])} | memory()


def memory() -> dict[str, int]:
    """Bytes: the most that was resident, what is now, what of that is of no file, and what no other process has."""
    rollup = {name: _kilobytes("smaps_rollup", name) for name in ("Rss", "Anonymous", "Private_Clean", "Private_Dirty")}
    # The system counts the peak in batches of pages, what is resident page by page.
    return {
        "peak_resident_bytes": max(_kilobytes("status", "VmHWM"), rollup["Rss"]),
        "resident_bytes": rollup["Rss"],
        "anonymous_bytes": rollup["Anonymous"],
        "own_bytes": rollup["Private_Clean"] + rollup["Private_Dirty"],
    }


def _kilobytes(file: str, name: str) -> int:
    text = Path("/proc/self", file).read_text(encoding="ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    request = json.loads(sys.argv[1])
    print(json.dumps(write(request) if "write" in request else measure(request)), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
