"""Peak memory, time and size of quantizing a large random export, against copying the same weights.

    python benchmarks/quantize_memory.py --size 1.3b -o benchmarks/quantize_memory.json

Writes a checkpoint of random float32 weights to a temporary folder, exports it (it needs four times its size on disk),
then alternates `cp` of the weights and `retnet-tools quantize` in processes of their own, and at last runs
`retnet-tools export --quantize` once for each type. Peak memory is ru_maxrss of the process, which counts mapped file
pages too. Times end when the data is on the disk (`sync`).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from large_checkpoint import COMMAND, alternate, heading, main, run_each, summary, write_checkpoint

from retnet_tools.graph.contract import MANIFEST_FILE, WEIGHTS_FILE


def measure(size: str, rounds: int, folder: Path, types: list[str]) -> dict[str, Any]:
    """Alternate copies and quantizations."""
    source, floats, out = folder / "checkpoint", folder / "float", folder / "out"
    nbytes = write_checkpoint(source, size, shard_size=1 << 40)
    subprocess.run([*COMMAND, "export", str(source), "-o", str(floats)], check=True, stdout=subprocess.DEVNULL)
    sizes: dict[str, Any] = {}
    copies, runs = alternate(
        rounds,
        ["cp", floats / WEIGHTS_FILE, folder / "copy"],
        {kind: ["quantize", floats, "-o", out, "--quantize", kind] for kind in types},
        out,
        after=lambda kind: sizes.update({kind: file_size(out, floats)}),
    )
    shutil.rmtree(floats)
    at_once = run_each({kind: ["export", source, "-o", out, "--quantize", kind] for kind in types}, out)
    return {
        **heading(size, nbytes, copies),
        "quantize": {kind: {**summary(runs[kind], copies), **sizes[kind]} for kind in types},
        "export_and_quantize": {kind: summary([at_once[kind]], copies) for kind in types},
    }


def file_size(out: Path, floats: Path) -> dict[str, Any]:
    """The size of weights.data, alone and against the float one."""
    size, before = ((path / WEIGHTS_FILE).stat().st_size for path in (out, floats))
    scheme = json.loads((out / MANIFEST_FILE).read_text())["quantization"]
    return {"weights_bytes": size, "of_float": round(size / before, 4), "scheme": scheme and scheme["scheme"]}


if __name__ == "__main__":
    main(__doc__ or "", measure, types="int8,int4")
