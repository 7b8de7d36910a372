"""retnet.json: what an exported folder holds and where it came from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import ConfigError, InputError
from retnet_tools.file_records import FileRecord
from retnet_tools.graph.contract import (
    DEVICES,
    EXPORT_AGAIN,
    LATER_OPSETS,
    MANIFEST_FILE,
    MAX_POSITION,
    OPERATORS,
    OPSET,
    WEIGHTS_FILE,
    TensorSpec,
    state_scale,
)
from retnet_tools.graph.quantization import Quantization
from retnet_tools.inputs import load_json, part_path
from retnet_tools.replacing import is_being_replaced

SCHEMA_VERSION = 1
FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Manifest:
    """The content of retnet.json.

    Attributes:
        dtype: of weights and activations: float32, float16 or bfloat16.
        state_dtype: of the recurrent states; the JSON also says `state_scale`, which follows from it and the model.
        ops: the operator set, by name.
        quantization: the scheme and what came of it; None for float weights.
        provenance: source format, sha256 of each source file, tool and library versions.
        graphs: for each graph file its inputs and outputs.
        tokenizer_files: names of the tokenizer's files in the folder.
        device: whose kernels the graphs were made for; they run on all.
        files: size and sha256 of every other file of the export, by name; empty in exports from before there were any.
        opset: the version of ai.onnx.
    """

    config: RetNetConfig
    dtype: str
    state_dtype: str
    ops: str
    quantization: Quantization | None
    provenance: dict[str, Any]
    graphs: dict[str, dict[str, tuple[TensorSpec, ...]]]
    tokenizer_files: tuple[str, ...]
    device: str = "cpu"
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    opset: int = OPSET

    def fingerprint(self) -> dict[str, str]:
        """What a saved state depends on, by name: the model, and the types that its numbers were made with."""
        sources = [file["sha256"] for file in self.provenance["source_files"]]
        model = json.dumps([self.config.identity(), sources], sort_keys=True)
        return {
            "model": hashlib.sha256(model.encode()).hexdigest(),
            "dtype": self.dtype,
            "state_dtype": self.state_dtype,
            "quantization": "none" if self.quantization is None else self.quantization.fingerprint(),
        }

    def to_json(self) -> str:
        """The document, as written."""
        document = {
            "schema_version": SCHEMA_VERSION,
            "dtype": self.dtype,
            "state_dtype": self.state_dtype,
            "state_scale": list(state_scale(self.config, self.state_dtype)),
            "ops": self.ops,
            "opset": self.opset,
            "device": self.device,
            "quantization": None if self.quantization is None else self.quantization.to_dict(),
            "max_position": MAX_POSITION,
            "tokenizer_files": list(self.tokenizer_files),
            "provenance": self.provenance,
            "files": {name: dataclasses.asdict(record) for name, record in self.files.items()},
            "graphs": {
                name: {side: [dataclasses.asdict(spec) for spec in specs] for side, specs in graph.items()}
                for name, graph in self.graphs.items()
            },
            "config": self.config.to_dict(),
        }
        return json.dumps(document, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an exported folder, whose files have to be as long as it says.

    The card, and what other programs read, may have been edited since.

    Raises:
        InputError: as `parse_manifest`, or a graph, weights.data or a file of the tokenizer is missing or cut short.
    """
    manifest = parse_manifest(folder)
    for name in (*manifest.graphs, WEIGHTS_FILE, *manifest.tokenizer_files):
        if (record := manifest.files.get(name)) is not None and (problem := record.size_problem(folder / name)):
            raise InputError(
                f"{folder / name} {problem}", f"{record.bytes} bytes, as {MANIFEST_FILE} says", EXPORT_AGAIN
            )
    return manifest


def parse_manifest(folder: Path) -> Manifest:
    """What the manifest of an exported folder says.

    Raises:
        InputError: no manifest, not JSON, another schema version, or a field that is missing, unknown or wrong.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        expected = "a folder written by `retnet-tools export`"
        stopped = is_being_replaced(folder)
        action = "run the command that was stopped here again" if stopped else "export the checkpoint first"
        raise InputError(f"{folder} has no {MANIFEST_FILE}", expected, action)
    try:
        data = load_json(path, "the JSON that export writes", EXPORT_AGAIN)
        version = data["schema_version"]
        if type(version) is not int or version != SCHEMA_VERSION:
            raise InputError(f"{path} has schema_version {version!r}", str(SCHEMA_VERSION), EXPORT_AGAIN)
        # Exports from before there was a choice were for the CPU, and of one opset.
        data.setdefault("device", "cpu")
        data.setdefault("opset", OPSET)
        for name, choices in (("dtype", FLOATS), ("state_dtype", FLOATS), ("device", DEVICES), ("ops", OPERATORS)):
            _check_choice(path, data, name, choices)
        later = LATER_OPSETS.get((data["ops"], data["device"]), ())
        _check_choice(path, data, "opset", (OPSET, *later))
        return Manifest(
            config=RetNetConfig.from_dict(data["config"]),
            dtype=data["dtype"],
            state_dtype=data["state_dtype"],
            ops=data["ops"],
            quantization=None if data["quantization"] is None else Quantization.from_dict(data["quantization"]),
            provenance=_provenance(data["provenance"]),
            graphs={_name(name): _border(graph) for name, graph in data["graphs"].items()},
            tokenizer_files=tuple(map(_name, data["tokenizer_files"])),
            device=data["device"],
            files=_records(data),
            opset=int(data["opset"]),
        )
    except ConfigError as error:
        raise InputError(f"{path}: {error.found}", error.expected, EXPORT_AGAIN) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{path} is not a manifest ({what})", "the JSON that export writes", EXPORT_AGAIN) from error


def _records(data: Mapping[str, Any]) -> dict[str, FileRecord]:
    records = {_name(name): FileRecord.from_dict(record) for name, record in data.get("files", {}).items()}
    if records and (missing := {*data["graphs"], WEIGHTS_FILE, *data["tokenizer_files"]} - records.keys()):
        raise ValueError(f"files has no record of {min(missing)}")
    return records


def _check_choice(path: Path, data: Mapping[str, Any], name: str, choices: Iterable[object]) -> None:
    if data[name] not in choices:
        known = ", ".join(map(str, choices))
        raise InputError(f"{path} has {name} {data[name]!r}", f"one of {known}", "export again")


def _name(name: Any) -> str:
    """The name of a file in the folder."""
    if part_path(Path(), name) is None:
        raise ValueError(f"the file name {str(name)[:80]!r}")
    return str(name)


def _provenance(data: Any) -> dict[str, Any]:
    """A record of which the parts that are read are of their types."""
    files, notes = data["source_files"], data.get("notes", [])
    if not isinstance(files, list) or not all(isinstance(file["sha256"], str) for file in files):
        raise ValueError("provenance.source_files without sha256")
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise ValueError("provenance.notes that are no texts")
    return dict(data)


def _border(graph: Any) -> dict[str, tuple[TensorSpec, ...]]:
    if set(graph) != {"inputs", "outputs"}:
        raise ValueError("a graph without inputs and outputs")
    return {side: tuple(map(_spec, specs)) for side, specs in graph.items()}


def _spec(data: Any) -> TensorSpec:
    spec = TensorSpec(data["name"], data["dtype"], tuple(data["shape"]))
    if not isinstance(spec.name, str) or not isinstance(spec.dtype, str):
        raise ValueError("an input or output without a name and a type")
    if not all(isinstance(size, str) or (type(size) is int and size >= 0) for size in spec.shape):
        raise ValueError(f"{spec.name[:80]!r} of shape {str(spec.shape)[:80]}")
    return spec
