"""Graphs with their weights packed for this processor, kept between runs: opened by mapping them.

The CPU provider packs the weights of quantized and half-precision graphs for its kernels, and widens half ones, into
memory of its own: 1.4 GB and a second and a half for a 1.3b model in int8, at every start. ONNX Runtime can write what
it packed beside the optimized graph, and map it the next time: pages that all processes share.

They lie in a folder for each graph, weights file, build of ONNX Runtime and kind of processor, in `packed/` under
`$RETNET_TOOLS_CACHE` (`~/.cache/retnet-tools` without), as large as twice the weights. A new one takes the place of
those that were opened longest ago where all would be more than `LIMIT` bytes. `RETNET_TOOLS_CACHE=off` keeps nothing.
Only what this user alone may write is read. Nothing here is needed: what cannot be kept is packed at every start.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from retnet_tools.console import LOG
from retnet_tools.disk import make_private, remove_path
from retnet_tools.graph.contract import ATTENTION_MASK, POSITION_IDS, WEIGHTS_FILE
from retnet_tools.graph.manifest import Manifest
from retnet_tools.machine import processor_features
from retnet_tools.runtime.onnx_session import open_session
from retnet_tools.runtime.providers import CPU, Device
from retnet_tools.staging import staged_folder

if TYPE_CHECKING:
    import onnxruntime

VARIABLE = "RETNET_TOOLS_CACHE"
LEAST_BYTES = 64 << 20
"""Of weights that are worth it: fewer are packed within a tenth of a second."""
LIMIT = 32 << 30
"""Bytes of all that is kept."""
_FORMAT = 2
_ALIGNMENT = 64
_TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}
_COPIES = 2
"""As ONNX Runtime writes them: weights as they are and packed, or widened from half precision."""


def cache_folder() -> Path | None:
    """Where packed graphs are kept; None where nothing is to be."""
    chosen = os.environ.get(VARIABLE, "")
    if chosen == "off":
        return None
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    try:
        own = Path(chosen) if chosen else (Path(base) if base else Path.home() / ".cache") / "retnet-tools"
        return own / "packed"
    except RuntimeError:
        # A user without a home.
        return None


def is_packed(manifest: Manifest) -> bool:
    """Whether kernels want weights packed.

    Products with floats are nearly as fast as they lie in the file, where they are neither copied nor waited for. In
    turns, packed / as they lie, on two cores of an Intel Xeon: 51.2 / 53.0 ms a token at 300m, 242 / 215 at 1.3b, and
    3.9 / 3.7 s for 256 tokens of it; of an AMD EPYC, twice: 43.2 / 54.3 and 58.4 / 65.8, 198 / 218 and 199 / 205,
    3.9 / 4.2 and 3.7 / 4.0 s.
    """
    return manifest.quantization is not None and manifest.quantization.blocks is not None


def are_mapped(manifest: Manifest) -> bool:
    """Whether ONNX Runtime uses weights where they lie in the export's own file."""
    return manifest.dtype == "float32" and not is_packed(manifest)


def packed_graph(folder: Path, manifest: Manifest, name: str, threads: int | None) -> Path | None:
    """A graph of an exported folder, packed; made and kept where it has not been yet.

    Memory: making it holds the packed weights once. What was made is run beside what it was made of before it is kept.

    Returns:
        None where weights are mapped as they are, where they are few or more than the limit, for an export without
        records of its files, and where nothing can be kept.
    """
    weights, cache = folder / WEIGHTS_FILE, cache_folder()
    size = weights.stat().st_size
    needed = _COPIES * size
    few_or_too_many = size < LEAST_BYTES or needed > LIMIT
    if cache is None or few_or_too_many or are_mapped(manifest) or name not in manifest.files:
        return None
    try:
        packed = cache / _key(folder, manifest, name) / name
        make_private(cache)
        _check_owner(cache)
        if packed.is_file():
            os.utime(packed.parent)
            return packed
        data = packed.with_suffix(".data").name
        room = needed + needed // 16
        with staged_folder(packed.parent, marker=name, required_bytes=room, force=True, ours=(data,)) as made:
            _make_room(cache, needed)
            LOG.info("packing the weights of %s for this processor, once (%.1f GB in %s)", folder, needed / 1e9, cache)
            opened = partial(open_session, device=Device(CPU.name), threads=threads, prepack=is_packed(manifest))
            # One after the other, which are not both in memory.
            expected = _results(opened(folder / name, keep=made / name))
            _align_packed(made / name)
            if _results(opened(made / name, kept=True)) != expected:
                raise ValueError(f"{made / name} computes otherwise")
    except Exception as error:
        # A full disk, another process that is at it or makes room, a folder that cannot be read or written, an ONNX
        # Runtime that writes otherwise: the export itself is still there.
        LOG.debug("not kept: %s", error)
        return None
    return packed


def _check_owner(cache: Path) -> None:
    """Kernels trust what is kept: nobody else may have put it there."""
    found = cache.stat()
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022):
        raise PermissionError(f"{cache} may be written by others")


def _align_packed(graph: Path) -> None:
    """Move packed weights to multiples of 64 bytes: kernels round an address up to one before they read.

    ONNX Runtime 1.31 writes those of matrices below 1 MB wherever the last ones ended and maps them as they lie, so
    that products with them are of other bytes.
    """
    model = onnx.load(graph, load_external_data=False)
    with graph.with_suffix(".data").open("r+b") as data:

        def moved(blob: str) -> str:
            offset, length, checksum = blob.split(";")
            if int(offset) % _ALIGNMENT == 0:
                return blob
            data.seek(int(offset))
            packed, end = data.read(int(length)), data.seek(0, os.SEEK_END)
            data.write(bytes(-end % _ALIGNMENT) + packed)
            return f"{end + -end % _ALIGNMENT};{length};{checksum}"

        for entry in (entry for tensor in model.graph.initializer for entry in tensor.external_data):
            if entry.key.startswith("prepacked"):
                key, *blobs = entry.value.split("|")
                entry.value = "|".join((key, *map(moved, blobs)))
    graph.write_bytes(model.SerializeToString())


def _results(session: onnxruntime.InferenceSession) -> list[bytes]:
    """Hashes of all that a graph gives of one token, and of two, from states of zeros."""
    found = []
    for tokens in (1, 2):
        sizes = {"batch": 1, "tokens": tokens, "logits": 1}
        feeds = {
            value.name: np.zeros([sizes.get(size, size) for size in value.shape], _TYPES[value.type])
            for value in session.get_inputs()
        }
        feeds[POSITION_IDS] += np.arange(tokens)
        feeds[ATTENTION_MASK] += 1
        found += [hashlib.sha256(value.tobytes()).digest() for value in session.run(None, feeds)]
    return found


def forget_packed(packed: Path, reason: str) -> None:
    """Remove a graph that cannot be opened: half of it lost, or room made for another in this moment."""
    LOG.info("packing the weights anew: %s", reason)
    remove_path(packed.parent)


def _key(folder: Path, manifest: Manifest, name: str) -> str:
    """What decides the packed bytes. Times tell a file that was changed in place from what its record says."""
    import onnxruntime

    files = [[manifest.files[file].sha256, (folder / file).stat().st_mtime_ns] for file in (name, WEIGHTS_FILE)]
    build = [str(onnxruntime.__version__), str(onnxruntime.get_build_info())]
    decides = [_FORMAT, files, build, processor_features()]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]


def kept_bytes(cache: Path) -> dict[Path, int]:
    """The size of each packed graph in a cache, what was opened longest ago first; other folders do not count."""
    found: dict[Path, tuple[float, int]] = {}
    with suppress(OSError):
        for path in cache.iterdir():
            with suppress(OSError):
                if re.fullmatch("[0-9a-f]{32}", path.name) and path.is_dir() and not path.is_symlink():
                    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
                    found[path] = (path.stat().st_mtime, size)
    return {path: size for path, (_, size) in sorted(found.items(), key=lambda item: item[1])}


def _make_room(cache: Path, needed: int) -> None:
    """Remove the oldest until `needed` bytes more are within the limit."""
    sizes = kept_bytes(cache)
    total = sum(sizes.values())
    for path, size in sizes.items():
        if total + needed <= LIMIT:
            return
        remove_path(path)
        total -= size
