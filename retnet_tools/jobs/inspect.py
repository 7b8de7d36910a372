"""What a checkpoint or an exported folder holds, and what looks wrong in it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from retnet_tools.errors import InputError, RetNetToolsError
from retnet_tools.jobs.request import CheckpointRequest
from retnet_tools.progress import Progress, in_megabytes, no_progress

if TYPE_CHECKING:
    from retnet_tools.config import RetNetConfig
    from retnet_tools.evaluate.lint import Finding, HeadMemory
    from retnet_tools.formats import CheckpointSource
    from retnet_tools.formats.integrity import FileCheck
    from retnet_tools.graph.manifest import Manifest
    from retnet_tools.weights import WeightSource

PARTS = ("embedding", "retention projections", "feed-forward", "norms", "output head")


@dataclass(frozen=True)
class InspectRequest(CheckpointRequest):
    """A checkpoint, or an exported folder by itself or a file of its own.

    Attributes:
        checkpoint: an exported folder, or a checkpoint: a folder, a file, or a name on the hub.
        quick: do not read the tensors' data.
        check: hold every file to the size and hash that were recorded when it was written; those of a checkpoint to
            what headers, index, checksums of a torch file and the hub's cache say of them.
    """

    _: KW_ONLY
    quick: bool = False
    check: bool = False


@dataclass(frozen=True)
class StoredModel:
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
    manifest: Manifest | None
    node_counts: Mapping[str, Mapping[str, int]]

    @property
    def state_dtype(self) -> str:
        """The type of its recurrent states."""
        return "float32" if self.manifest is None else self.manifest.state_dtype


@dataclass(frozen=True)
class InspectResult:
    """What a model holds.

    Attributes:
        parameters: how many, by part; a tied output head has none of its own.
        bytes_by_dtype: of the stored tensors, the most first.
        state_bytes: of one layer's recurrent state `[H, K, V]` of one sequence.
        heads: what each head can remember.
        findings: what looks wrong, errors first; without the tensors' data in a quick look.
        checks: what was held against each file, where that was asked for.
    """

    request: InspectRequest = field(repr=False)
    model: StoredModel = field(repr=False)
    parameters: Mapping[str, int]
    tensors: int
    bytes_by_dtype: Mapping[str, int]
    state_bytes: int
    heads: tuple[HeadMemory, ...]
    findings: tuple[Finding, ...]
    checks: tuple[FileCheck, ...]

    def count(self, severity: str) -> int:
        """How many findings there are of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def require_intact(self) -> None:
        """Do nothing where every file that was checked is what was written.

        Raises:
            InputError: one is not.
        """
        from retnet_tools.formats.integrity import require_intact

        require_intact(self.checks)

    def require_clean(self) -> None:
        """Do nothing where there is neither an error nor a warning.

        Raises:
            RetNetToolsError: there is one.
        """
        from retnet_tools.evaluate.lint import counted

        errors, warnings = self.count("error"), self.count("warning")
        if errors or warnings:
            found = f"lint found {counted(errors, 'error')} and {counted(warnings, 'warning')}"
            raise RetNetToolsError(f"{self.model.path}: {found}", "none with --strict")


def inspect(request: InspectRequest, progress: Progress = no_progress) -> InspectResult:
    """Count, measure and lint; one tensor in memory at a time.

    Raises:
        InputError: missing, corrupt, incomplete or of no known kind.
        UsageError: options that do not fit.
    """
    return inspect_model(request, open_model(request.source()), progress)


def inspect_model(request: InspectRequest, model: StoredModel, progress: Progress = no_progress) -> InspectResult:
    """The same of an opened model.

    Raises:
        InputError: a file that ends early.
    """
    from retnet_tools.evaluate.lint import SEVERITIES, head_memories, lint_config, lint_tokenizer
    from retnet_tools.evaluate.weight_lint import lint_weights

    config, by_dtype = model.config, Counter[str]()
    for name in model.weights.names():
        info = model.weights.info(name)
        by_dtype[info.dtype.name] += info.nbytes
    findings = [*lint_config(config, by_dtype), *lint_tokenizer(config.vocab_size, model.tokenizer_files)]
    if not request.quick:
        findings += lint_weights(model.weights, in_megabytes(progress, "inspect", by_dtype.total()))
    return InspectResult(
        request=request,
        model=model,
        parameters=parameters_by_part(config),
        tensors=len(list(model.weights.names())),
        bytes_by_dtype=dict(by_dtype.most_common()),
        state_bytes=layer_state_bytes(config, model.state_dtype),
        heads=head_memories(config),
        findings=tuple(sorted(findings, key=lambda f: SEVERITIES.index(f.severity))),
        checks=_check_files(model, progress) if request.check else (),
    )


def _check_files(model: StoredModel, progress: Progress) -> tuple[FileCheck, ...]:
    from retnet_tools.formats.integrity import check_checkpoint, check_records
    from retnet_tools.graph.contract import EXPORT_AGAIN, MANIFEST_FILE
    from retnet_tools.graph.targets import READ_FILES

    if model.manifest is None:
        told = in_megabytes(progress, "check", sum(model.files.values()))
        return tuple(check_checkpoint(list(model.files), told))
    if not (records := model.manifest.files):
        found = f"{model.path / MANIFEST_FILE} has no sizes and hashes of its files"
        raise InputError(found, "an export of this version", EXPORT_AGAIN)
    told = in_megabytes(progress, "check", sum(record.bytes for record in records.values()))
    return tuple(check_records(model.path, records, READ_FILES, told))


def open_model(source: CheckpointSource) -> StoredModel:
    """Open a checkpoint, or an exported folder (by the folder or a file of its own in it).

    Args:
        source: what to open, and how; where it says how, it is no export.
    """
    from retnet_tools.graph.contract import MANIFEST_FILE, WEIGHTS_FILE

    path = source.path
    folder = path if path.is_dir() else path.parent
    own_file = path.suffix == ".onnx" or path.name in (MANIFEST_FILE, WEIGHTS_FILE)
    if not source.says_how and (folder / MANIFEST_FILE).is_file() and (path.is_dir() or own_file):
        return _open_export(folder)
    checkpoint = source.open()
    return StoredModel(
        path=checkpoint.path,
        format=checkpoint.format,
        config=checkpoint.config,
        weights=checkpoint.weights,
        files=_sizes(checkpoint.source_files),
        tokenizer_files=tuple(checkpoint.tokenizer_files),
        notes=tuple(checkpoint.notes),
        manifest=None,
        node_counts={},
    )


def layer_state_bytes(config: RetNetConfig, dtype: str) -> int:
    """Bytes of one layer's recurrent state `[H, K, V]` of one sequence."""
    from retnet_tools.dtypes import NUMPY_DTYPES
    from retnet_tools.graph.contract import state_shape

    sizes = {str(name): stored.itemsize for name, stored in NUMPY_DTYPES.items()}
    return math.prod(state_shape(config)) * sizes[dtype]


def parameters_by_part(config: RetNetConfig) -> dict[str, int]:
    """Number of parameters in each of `PARTS`; merged projections and a tied head are counted once."""
    from retnet_tools.weights import canonical_shapes

    parts = dict.fromkeys(PARTS, 0)
    for name, shape in canonical_shapes(config).items():
        parts[_part_of(name)] += math.prod(shape)
    return parts


def _part_of(name: str) -> str:
    """The part that a canonical tensor belongs to."""
    if name.rpartition(".")[0].endswith("norm"):
        return "norms"
    if name.startswith("embedding."):
        return "embedding"
    if name.startswith("lm_head."):
        return "output head"
    return "retention projections" if ".retention." in name else "feed-forward"


def _open_export(folder: Path) -> StoredModel:
    from retnet_tools.dtypes import NUMPY_DTYPES
    from retnet_tools.graph.contract import MANIFEST_FILE, WEIGHTS_FILE
    from retnet_tools.graph.folder import read_graphs
    from retnet_tools.graph.manifest import SCHEMA_VERSION, read_manifest

    manifest = read_manifest(folder)
    if manifest.state_dtype not in NUMPY_DTYPES:
        raise InputError(
            f"{folder / MANIFEST_FILE} has state_dtype {manifest.state_dtype!r}", f"one of {', '.join(NUMPY_DTYPES)}"
        )
    graphs = read_graphs(folder, manifest.graphs)
    return StoredModel(
        path=folder,
        format=f"retnet-tools export {SCHEMA_VERSION}",
        config=manifest.config,
        weights=graphs.tensors,
        files=_sizes([*(folder / name for name in manifest.graphs), folder / WEIGHTS_FILE, folder / MANIFEST_FILE]),
        tokenizer_files=tuple(folder / name for name in manifest.tokenizer_files),
        notes=tuple(manifest.provenance.get("notes", ())),
        manifest=manifest,
        node_counts=graphs.node_counts,
    )


def _sizes(files: Iterable[Path]) -> dict[Path, int]:
    return {file: file.stat().st_size for file in files}
