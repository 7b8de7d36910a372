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
from retnet_tools.formats.integrity import FileRecord
from retnet_tools.graph.contract import (
    EXPORT_AGAIN,
    MANIFEST_FILE,
    MAX_POSITION,
    WEIGHTS_FILE,
    TensorSpec,
    state_scale,
)
from retnet_tools.graph.quantization import Quantization
from retnet_tools.graph.targets import TARGET_DEVICES

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
        raise InputError(f"{folder} has no {MANIFEST_FILE}", expected, "export the checkpoint first")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if (version := data["schema_version"]) != SCHEMA_VERSION:
            raise InputError(f"{path} has schema_version {version}", str(SCHEMA_VERSION), EXPORT_AGAIN)
        # Exports from before there was a choice were for the CPU.
        data.setdefault("device", "cpu")
        for name, choices in (("dtype", FLOATS), ("state_dtype", FLOATS), ("device", TARGET_DEVICES)):
            _check_choice(path, data, name, choices)
        _check_choice(path, data, "ops", TARGET_DEVICES[data["device"]].operators)
        return Manifest(
            config=RetNetConfig.from_dict(data["config"]),
            dtype=data["dtype"],
            state_dtype=data["state_dtype"],
            ops=data["ops"],
            quantization=None if data["quantization"] is None else Quantization.from_dict(data["quantization"]),
            provenance=data["provenance"],
            graphs={
                name: {side: tuple(map(_spec, specs)) for side, specs in graph.items()}
                for name, graph in data["graphs"].items()
            },
            tokenizer_files=tuple(data["tokenizer_files"]),
            device=data["device"],
            files={name: FileRecord.from_dict(record) for name, record in data.get("files", {}).items()},
        )
    except ConfigError as error:
        raise InputError(f"{path}: {error.found}", error.expected, EXPORT_AGAIN) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a manifest ({error})", "the JSON that export writes") from error


def _check_choice(path: Path, data: Mapping[str, Any], name: str, choices: Iterable[str]) -> None:
    if data[name] not in choices:
        raise InputError(f"{path} has {name} {data[name]!r}", f"one of {', '.join(choices)}", "export again")


def _spec(data: dict[str, Any]) -> TensorSpec:
    return TensorSpec(data["name"], data["dtype"], tuple(data["shape"]))
