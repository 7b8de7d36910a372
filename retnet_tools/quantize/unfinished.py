"""Results of a long run that are kept while it runs, so that the next one goes on where it was stopped.

They lie in a hidden folder beside the output, `.<output>.unfinished`, in a folder for each kind of work, which is
named after a hash of everything that the results depend on. Each file appears whole or not at all. Work of the same
kind under another hash is removed when new work begins, and all of it when the output has been written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from retnet_tools import __version__
from retnet_tools.config import RetNetConfig
from retnet_tools.graph.quantization import BlockFormat
from retnet_tools.quantize.blockwise import QuantizedRows
from retnet_tools.weights import Array, WeightSource, read_blocks


def unfinished_folder(out: Path) -> Path:
    """Where results for an output are kept."""
    out = out.resolve()
    return out.with_name(f".{out.name}.unfinished")


def hash_work(
    config: RetNetConfig, weights: WeightSource, formats: Mapping[str, Any], sequences: Array, **others: object
) -> str:
    """A hash of a model, of what is to be done with it and of the tokens it is done with. Reads every weight once."""
    digest = hashlib.sha256(json.dumps([__version__, config.to_dict(), others], sort_keys=True).encode())
    digest.update(json.dumps({name: _plain(format) for name, format in formats.items()}).encode())
    digest.update(f"{sequences.shape}".encode() + np.ascontiguousarray(sequences).tobytes())
    for name in sorted(weights.names()):
        info = weights.info(name)
        digest.update(f"{name} {info.dtype.name} {info.shape}".encode())
        for block in read_blocks(weights, name):
            digest.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class Unfinished:
    """The results of one kind of work.

    Args:
        parent: from `unfinished_folder`.
        kind: a word for the work.
        key: from `hash_work`.
    """

    def __init__(self, parent: Path, kind: str, key: str) -> None:
        self.folder = parent / f"{kind}-{key[:32]}"
        if parent.is_dir():
            for other in parent.glob(f"{kind}-*"):
                if other != self.folder:
                    shutil.rmtree(other, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for partial in self.folder.glob("*.partial"):
            partial.unlink()

    def __contains__(self, name: str) -> bool:
        return (self.folder / name).is_file()

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write to; it becomes the result `name` when the context ends without an error."""
        partial = self.folder / f"{name}.partial"
        yield partial
        os.replace(partial, self.folder / name)

    def discard(self, name: str) -> None:
        """Forget a result."""
        (self.folder / name).unlink(missing_ok=True)

    def save_rows(self, name: str, rows: QuantizedRows) -> None:
        """Keep the codes of a matrix under its name."""
        parts = {"codes": rows.codes, "scales": rows.scales.astype(np.float32)}
        if rows.zero_points is not None:
            parts["zero_points"] = rows.zero_points
        with self.writing(f"{name}.npz") as path, path.open("wb") as file:
            np.savez(file, **parts)  # type: ignore[arg-type]

    def has_rows(self, name: str) -> bool:
        """Whether the codes of a matrix are there."""
        return f"{name}.npz" in self

    def load_rows(self, name: str, scale_type: np.dtype[Any]) -> QuantizedRows:
        """The codes of a matrix; float32 has held scales of any type exactly."""
        with np.load(self.folder / f"{name}.npz") as parts:
            return QuantizedRows(parts["codes"], parts["scales"].astype(scale_type), parts.get("zero_points"))


def _plain(format: BlockFormat | list[BlockFormat] | None) -> Any:
    if isinstance(format, list):
        return [_plain(item) for item in format]
    return None if format is None else dataclasses.asdict(format)
