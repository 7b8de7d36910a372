"""Writes a checkpoint in our own format, one tensor at a time.

Every file is written under a partial name and renamed at the end, `config.json` last: a folder without it is no
checkpoint, so an interrupted write never looks finished.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import InputError, OutputError, UsageError
from retnet_tools.formats.storage import SAFETENSORS_DTYPES, ArrayWeights
from retnet_tools.weights import Array, TensorInfo, WeightSource, canonical_shapes, check_weights

FORMAT_NAME = "retnet-tools"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_PATTERN = "model-*-of-*.safetensors"
PARTIAL_SUFFIX = ".partial"
DEFAULT_SHARD_SIZE = 5_000_000_000
DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def write_canonical(
    path: Path,
    config: RetNetConfig,
    weights: Mapping[str, Array] | WeightSource,
    *,
    dtype: str | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    force: bool = False,
    extra_files: Sequence[Path] = (),
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write a checkpoint folder; other files that are in it stay.

    Memory: one tensor, and its converted copy where `dtype` differs.

    Args:
        path: the folder, made if it does not exist.
        weights: exactly the canonical tensors of `config`.
        dtype: float16, bfloat16, float32 or float64 for all tensors; None keeps each as it is.
        max_shard_size: bytes of tensor data in one file; a larger tensor has a file of its own.
        force: replace a checkpoint that is there.
        extra_files: copied beside, such as a tokenizer.
        progress: called with the bytes of each tensor once it is written.

    Returns:
        The files written.

    Raises:
        OutputError: a checkpoint is there and `force` is not set, the path is no folder, the disk is full.
        InputError: tensors that do not fit the configuration, or values beyond the range of `dtype`.
    """
    source = ArrayWeights(weights) if isinstance(weights, Mapping) else weights
    check_weights(config, source)
    target = _target_dtype(dtype)
    plan = _plan(config, source, target, max_shard_size)
    copies = [file for file in extra_files if file.resolve() != (path / file.name).resolve()]
    index = _index(plan)
    documents = {} if index is None else {INDEX_FILE: index}
    documents[CONFIG_FILE] = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, "config": config.to_dict()}
    names = [*plan, *(file.name for file in copies), *documents]
    if len(set(names)) < len(names):
        raise OutputError("an extra file has the name of a file of the checkpoint", "another name", "rename it")
    _check_free(path, [file.name for file in copies], force)
    created = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name, tensors in plan.items():
            _write_safetensors(_partial(path, name), tensors, source, progress)
        for file in copies:
            shutil.copyfile(file, _partial(path, file.name))
        for name, document in documents.items():
            _partial(path, name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        _publish(path, names)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}", "", "free space or name another folder"
        ) from error
    finally:
        _clean(path, names, created)
    return [path / name for name in names]


def _target_dtype(name: str | None) -> np.dtype[Any] | None:
    if name is not None and name not in DTYPES:
        raise UsageError(f"dtype {name!r}", f"one of {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]


def _plan(
    config: RetNetConfig, source: WeightSource, dtype: np.dtype[Any] | None, limit: int
) -> dict[str, dict[str, TensorInfo]]:
    """File name to its tensors, in canonical order."""
    if limit < 1:
        raise UsageError(f"max_shard_size is {limit}", "a positive number of bytes")
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name in canonical_shapes(config):
        info = source.info(name)
        info = TensorInfo(info.shape, dtype or DTYPES[info.dtype.name])
        if shards[-1] and size + info.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.nbytes
    if len(shards) == 1:
        return {WEIGHTS_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _index(plan: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, Any] | None:
    if len(plan) == 1:
        return None
    total = sum(info.nbytes for tensors in plan.values() for info in tensors.values())
    weight_map = {name: file for file, tensors in plan.items() for name in tensors}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _check_free(path: Path, extra: Sequence[str], force: bool) -> None:
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file", "a folder", "name another output")
    if force or not path.is_dir():
        return
    for found in _present(path, extra):
        raise OutputError(f"{found} exists already", "", "use --force to replace it, or name another output")


def _present(path: Path, extra: Sequence[str] = ()) -> list[Path]:
    named = [path / name for name in (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, *extra)]
    return [file for file in (*named, *sorted(path.glob(SHARD_PATTERN))) if file.exists()]


def _write_safetensors(
    file: Path, tensors: Mapping[str, TensorInfo], source: WeightSource, progress: Callable[[int], None] | None
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in tensors.items():
        offsets = [end, end + info.nbytes]
        header[name] = {"dtype": _SAFETENSORS_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        end += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, info in tensors.items():
            out.write(_converted(name, source.read(name), info.dtype).reshape(-1).view(np.uint8).data)
            if progress is not None:
                progress(info.nbytes)


def _converted(name: str, array: Array, dtype: np.dtype[Any]) -> Array:
    if array.dtype == dtype:
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(array.astype(dtype))
    if np.count_nonzero(np.isinf(converted)) > np.count_nonzero(np.isinf(array)):
        raise InputError(
            f"tensor {name!r} holds values beyond the range of {dtype.name}",
            "values that fit",
            "convert to bf16 or fp32",
        )
    return converted


def _partial(path: Path, name: str) -> Path:
    return path / f"{name}{PARTIAL_SUFFIX}"


def _publish(path: Path, names: Sequence[str]) -> None:
    """Take the old checkpoint away, its `config.json` first, and rename the new one into place, `config.json` last."""
    for old in _present(path):
        if old.name == CONFIG_FILE or old.name not in names:
            old.unlink()
    for name in names:
        _partial(path, name).replace(path / name)


def _clean(path: Path, names: Sequence[str], created: bool) -> None:
    for name in names:
        _partial(path, name).unlink(missing_ok=True)
    if created and path.is_dir() and not any(path.iterdir()):
        path.rmdir()
