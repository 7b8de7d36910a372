"""Results of a long run that are kept while it runs, so that the next one goes on where it was stopped.

They lie in a hidden folder beside the output, `.<output>.unfinished`, in a folder for each kind of work, which is
named after a hash of everything that the results depend on. Each file appears whole or not at all, and is on the disk
when it does. Work of the same kind under another hash is removed when new work begins. The place is locked against
other processes while work is open in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.disk import make_folders, remove_empty, remove_path, writing_to
from retnet_tools.errors import InputError
from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.inputs import open_input
from retnet_tools.quantize.blockwise import QuantizedRows
from retnet_tools.staging import locked, whole_file
from retnet_tools.version import __version__
from retnet_tools.weights import Array, WeightSource


def unfinished_folder(out: Path) -> Path:
    """Where results for an output are kept."""
    out = out.resolve()
    return out.with_name(f".{out.name}.unfinished")


def hash_work(
    config: RetNetConfig,
    weights: WeightSource,
    formats: Mapping[str, BlockFormat | None],
    sequences: Array,
    **others: object,
) -> str:
    """A hash of a model, of what is to be done with it and of the tokens it is done with. Reads every weight once.

    Args:
        weights: as the work reads them, so that what it would refuse is refused here.
    """
    digest = hashlib.sha256(json.dumps([__version__, config.identity(), others], sort_keys=True).encode())
    digest.update(json.dumps(dict(formats), default=dataclasses.asdict).encode())
    digest.update(f"{sequences.shape}".encode() + np.ascontiguousarray(sequences).tobytes())
    for name in sorted(weights.names()):
        info = weights.info(name)
        digest.update(f"{name} {info.dtype.name} {info.shape}".encode())
        for block in weights.blocks(name):
            digest.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class Workplace(ExitStack):
    """The place for the results of one output, and those of them that this process opened; a context.

    Args:
        folder: from `unfinished_folder`; made when the first work is opened.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._opened: list[Unfinished] = []

    @property
    def kept(self) -> bool:
        """Whether something that was opened here is there."""
        return any(work.folder.is_dir() for work in self._opened)

    def open(self, kind: str, key: str) -> Unfinished:
        """The results of one kind of work under a hash (`hash_work`), as they are now.

        Raises:
            UsageError: another process has work open here.
            OutputError: the folder cannot be written to.
        """
        if not self._opened:
            self.enter_context(locked(self.folder))
        work = Unfinished(self.folder, kind, key)
        self._opened.append(work)
        return work

    def remove(self) -> None:
        """Remove what was opened here, and the folder where nothing else is in it."""
        if not self._opened:
            return
        for work in self._opened:
            work.remove()
        # While the lock is held, so that nobody else's goes away.
        remove_empty(self.folder)
        self.close()


class Unfinished:
    """The results of one kind of work; see `Workplace.open`."""

    def __init__(self, parent: Path, kind: str, key: str) -> None:
        self.folder = parent / f"{kind}-{key[:32]}"
        for other in parent.glob(f"{kind}-*"):
            if other != self.folder:
                remove_path(other)
        with writing_to(self.folder, "a folder"):
            make_folders(self.folder)

    def __contains__(self, name: str) -> bool:
        return (self.folder / name).is_file()

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write to; it becomes the result `name` when the context ends without an error.

        Raises:
            OutputError: the disk is full.
        """
        with whole_file(self.folder / name) as partial:
            yield partial

    def discard(self, name: str) -> None:
        """Forget a result."""
        remove_path(self.folder / name)

    def remove(self) -> None:
        """Forget all results."""
        remove_path(self.folder)

    def save_rows(self, name: str, rows: QuantizedRows) -> None:
        """Keep the codes of a matrix under its name."""
        parts = {"codes": rows.codes, "scales": rows.scales.astype(np.float32)}
        if rows.zero_points is not None:
            parts["zero_points"] = rows.zero_points
        with self.writing(f"{name}.npz") as path, path.open("wb") as file:
            np.savez(file, **parts)  # type: ignore[arg-type]

    def load_rows(self, name: str, scale_type: np.dtype[Any]) -> QuantizedRows:
        """The codes of a matrix; float32 has held scales of any type exactly.

        Raises:
            InputError: the file is not what `save_rows` wrote.
        """
        file = self.folder / f"{name}.npz"
        try:
            with open_input(file) as stream, np.load(stream) as parts:
                return QuantizedRows(parts["codes"], parts["scales"].astype(scale_type), parts.get("zero_points"))
        except InputError:
            raise
        except Exception as error:  # numpy's own, zipfile's and zlib's
            found = f"{file} is broken ({type(error).__name__}: {error})"
            raise InputError(found, "results of an earlier run", f"remove {self.folder} and run it again") from error
