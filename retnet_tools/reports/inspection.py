"""What `inspect` finds out about a checkpoint or an exported folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import InputError, RetNetToolsError
from retnet_tools.evaluate.horizon import HeadMemory, head_memories
from retnet_tools.evaluate.lint import SEVERITIES, Finding, counted, lint_config, lint_tokenizer
from retnet_tools.evaluate.weight_lint import lint_weights
from retnet_tools.formats.source import CheckpointSource
from retnet_tools.graph.contract import MANIFEST_FILE, WEIGHTS_FILE, state_shape
from retnet_tools.graph.manifest import SCHEMA_VERSION as MANIFEST_VERSION
from retnet_tools.graph.manifest import Manifest, read_manifest
from retnet_tools.graph.reader import read_graphs
from retnet_tools.weights import WeightSource, canonical_shapes

SCHEMA_VERSION = 1
PARTS = ("embedding", "retention projections", "feed-forward", "norms", "output head")
_STATE_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Opened:
    """A model as it lies on disk, tensor data unread.

    Attributes:
        format: name and version.
        weights: canonical names, or the names in an exported graph.
        files: the files that make it, with their sizes.
        manifest: of an exported folder, else None.
        node_counts: of an exported folder: for each graph, its nodes by operator.
    """

    path: Path
    format: str
    config: RetNetConfig
    weights: WeightSource
    files: Mapping[Path, int]
    tokenizer_files: tuple[Path, ...]
    notes: tuple[str, ...]
    manifest: Manifest | None = None
    node_counts: Mapping[str, Mapping[str, int]] | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.weights.info(name).nbytes for name in self.weights.names())


@dataclass(frozen=True)
class StateSize:
    """The recurrent state of one sequence, whatever its length: `[H, K, V]` in every layer."""

    dtype: str
    layers: int
    bytes_per_layer: int

    @property
    def bytes_per_sequence(self) -> int:
        """Bytes in all layers."""
        return self.layers * self.bytes_per_layer


@dataclass(frozen=True)
class Inspection:
    """The results.

    Attributes:
        parameters: how many, by part; a tied output head has none of its own.
        bytes_by_dtype: bytes of the stored tensors.
        data_read: whether the findings include those that need the tensors' data.
    """

    opened: Opened
    parameters: Mapping[str, int]
    tensors: int
    bytes_by_dtype: Mapping[str, int]
    state: StateSize
    heads: tuple[HeadMemory, ...]
    findings: tuple[Finding, ...]
    data_read: bool


def open_model(source: CheckpointSource) -> Opened:
    """Open a checkpoint, or an exported folder (by the folder or a file of its own in it).

    Args:
        source: what to open, and how; where it says how, it is no export.

    Raises:
        InputError: missing, corrupt, incomplete or of no known kind.
        UsageError: options that do not fit.
    """
    path = source.path
    folder = path if path.is_dir() else path.parent
    own_file = path.suffix == ".onnx" or path.name in (MANIFEST_FILE, WEIGHTS_FILE)
    if not source.says_how and (folder / MANIFEST_FILE).is_file() and (path.is_dir() or own_file):
        return _open_export(folder)
    checkpoint = source.open()
    return Opened(
        path=checkpoint.path,
        format=checkpoint.format,
        config=checkpoint.config,
        weights=checkpoint.weights,
        files=_sizes(checkpoint.source_files),
        tokenizer_files=tuple(checkpoint.tokenizer_files),
        notes=tuple(checkpoint.notes),
    )


def inspect_model(opened: Opened, progress: Callable[[int], None] | None) -> Inspection:
    """Count, measure and lint.

    Args:
        opened: from `open_model`.
        progress: called with bytes read; None leaves the tensors' data unread.

    Raises:
        InputError: a file that ends early.
    """
    config = opened.config
    by_dtype: dict[str, int] = {}
    for name in opened.weights.names():
        info = opened.weights.info(name)
        by_dtype[info.dtype.name] = by_dtype.get(info.dtype.name, 0) + info.nbytes
    findings = [*lint_config(config, by_dtype), *lint_tokenizer(config.vocab_size, opened.tokenizer_files)]
    if progress is not None:
        findings += lint_weights(opened.weights, progress)
    return Inspection(
        opened=opened,
        parameters=parameters_by_part(config),
        tensors=len(list(opened.weights.names())),
        bytes_by_dtype=dict(sorted(by_dtype.items(), key=lambda item: -item[1])),
        state=state_size(config, "float32" if opened.manifest is None else opened.manifest.state_dtype),
        heads=head_memories(config),
        findings=tuple(sorted(findings, key=lambda f: SEVERITIES.index(f.severity))),
        data_read=progress is not None,
    )


def parameters_by_part(config: RetNetConfig) -> dict[str, int]:
    """Number of parameters in each of `PARTS`; merged projections and a tied head are counted once."""
    parts = dict.fromkeys(PARTS, 0)
    for name, shape in canonical_shapes(config).items():
        parts[part_of(name)] += math.prod(shape)
    return parts


def part_of(name: str) -> str:
    """The part that a canonical tensor belongs to."""
    if name.rpartition(".")[0].endswith("norm"):
        return "norms"
    if name.startswith("embedding."):
        return "embedding"
    if name.startswith("lm_head."):
        return "output head"
    return "retention projections" if ".retention." in name else "feed-forward"


def state_size(config: RetNetConfig, dtype: str) -> StateSize:
    """H K V numbers in each layer."""
    size = math.prod(state_shape(config)) * np.dtype(_STATE_TYPES[dtype]).itemsize
    return StateSize(dtype, config.num_layers, size)


def count_findings(result: Inspection) -> dict[str, int]:
    """How many findings there are of each severity."""
    return {severity: sum(f.severity == severity for f in result.findings) for severity in SEVERITIES}


def require_clean(result: Inspection) -> None:
    """End with exit code 1 where there is an error or a warning.

    Raises:
        RetNetToolsError: there is one.
    """
    counts = count_findings(result)
    if counts["error"] or counts["warning"]:
        found = f"lint found {counted(counts['error'], 'error')} and {counted(counts['warning'], 'warning')}"
        raise RetNetToolsError(f"{result.opened.path}: {found}", "none with --strict")


def inspection_document(result: Inspection) -> dict[str, Any]:
    """The JSON document of `retnet-tools inspect`; an endless half-life or horizon is null."""
    opened, state = result.opened, result.state
    return {
        "schema_version": SCHEMA_VERSION,
        "path": str(opened.path),
        "kind": "checkpoint" if opened.manifest is None else "export",
        "format": opened.format,
        "files": [{"name": file.name, "bytes": size} for file, size in opened.files.items()],
        "tokenizer_files": [file.name for file in opened.tokenizer_files],
        "config": opened.config.to_dict(),
        "parameters": {**result.parameters, "total": sum(result.parameters.values())},
        "tensors": result.tensors,
        "bytes_by_dtype": dict(result.bytes_by_dtype),
        "state": {
            "dtype": state.dtype,
            "bytes_per_layer": state.bytes_per_layer,
            "bytes_per_sequence": state.bytes_per_sequence,
        },
        "heads": [
            {
                "head": head.head,
                "log_gamma": head.log_gamma,
                "gamma": head.gamma,
                "half_life": head.half_life,
                "horizon_1_percent": head.horizon,
            }
            for head in result.heads
        ],
        "export": _export_fields(opened),
        "lint": {
            "data_read": result.data_read,
            "counts": count_findings(result),
            "findings": [asdict(finding) for finding in result.findings],
        },
        "notes": list(opened.notes),
    }


def _open_export(folder: Path) -> Opened:
    manifest = read_manifest(folder)
    if manifest.state_dtype not in _STATE_TYPES:
        raise InputError(
            f"{folder / MANIFEST_FILE} has state_dtype {manifest.state_dtype!r}", f"one of {', '.join(_STATE_TYPES)}"
        )
    graphs = read_graphs(folder, manifest.graphs)
    return Opened(
        path=folder,
        format=f"retnet-tools export {MANIFEST_VERSION}",
        config=manifest.config,
        weights=graphs.tensors,
        files=_sizes([*(folder / name for name in manifest.graphs), folder / WEIGHTS_FILE, folder / MANIFEST_FILE]),
        tokenizer_files=tuple(folder / name for name in manifest.tokenizer_files),
        notes=tuple(manifest.provenance.get("notes", ())),
        manifest=manifest,
        node_counts=graphs.node_counts,
    )


def _export_fields(opened: Opened) -> dict[str, Any] | None:
    manifest = opened.manifest
    if manifest is None:
        return None
    counts = opened.node_counts or {}
    return {
        "dtype": manifest.dtype,
        "state_dtype": manifest.state_dtype,
        "ops": manifest.ops,
        "quantization": None if manifest.quantization is None else manifest.quantization.to_dict(),
        "provenance": manifest.provenance,
        "graphs": {name: {"nodes": sum(ops.values()), "operators": dict(ops)} for name, ops in counts.items()},
    }


def _sizes(files: list[Path]) -> dict[Path, int]:
    return {file: file.stat().st_size for file in files}
