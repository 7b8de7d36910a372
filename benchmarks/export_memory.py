"""Peak memory and time of exporting a large random checkpoint, against copying the same file.

    python benchmarks/export_memory.py --size 1.3b -o benchmarks/export_memory.json

Writes a checkpoint of random float32 weights in the canonical format to a temporary folder (it needs three times its
size on disk), then alternates `cp` of it and `retnet-tools export` in processes of their own. Peak memory is
ru_maxrss of the export process, which counts mapped file pages too. Times end when the data is on the disk (`sync`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from large_checkpoint import alternate, heading, main, summary, write_checkpoint


def measure(size: str, rounds: int, folder: Path, dtypes: list[str]) -> dict[str, Any]:
    """Alternate copies and exports."""
    source, out = folder / "checkpoint", folder / "out"
    nbytes = write_checkpoint(source, size, shard_size=1 << 40)
    commands = {dtype: ["export", source, "-o", out, "--dtype", dtype] for dtype in dtypes}
    copies, exports = alternate(rounds, ["cp", source / "model.safetensors", folder / "copy"], commands, out)
    return {
        **heading(size, nbytes, copies),
        "exports": {dtype: summary(runs, copies) for dtype, runs in exports.items()},
    }


if __name__ == "__main__":
    main(__doc__ or "", measure)
