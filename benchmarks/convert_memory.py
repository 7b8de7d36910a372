"""Peak memory and time of converting a large sharded checkpoint, against copying its folder.

    python benchmarks/convert_memory.py --size 1.3b --dtype as-stored,bf16 -o benchmarks/convert_memory.json

Like export_memory.py: random float32 weights in shards of 1 GB, `cp -r` and `retnet-tools convert` in turn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from large_checkpoint import alternate, heading, main, summary, write_checkpoint


def measure(size: str, rounds: int, folder: Path, dtypes: list[str]) -> dict[str, Any]:
    """Alternate copies and conversions; to canonical in each type, and to torchscale as stored."""
    source, out = folder / "checkpoint", folder / "out"
    nbytes = write_checkpoint(source, size, shard_size=10**9)
    options = {f"canonical, {dtype}": ["--dtype", dtype] if dtype != "as-stored" else [] for dtype in dtypes}
    options["torchscale, as-stored"] = ["--to", "torchscale"]
    commands = {name: ["convert", source, out, *arguments] for name, arguments in options.items()}
    copies, conversions = alternate(rounds, ["cp", "-r", source, folder / "copy"], commands, out)
    document = heading(size, nbytes, copies)
    document["shards"] = len(list(source.glob("model-*.safetensors")))
    document["conversions"] = {name: summary(runs, copies) for name, runs in conversions.items()}
    return document


if __name__ == "__main__":
    main(__doc__ or "", measure)
