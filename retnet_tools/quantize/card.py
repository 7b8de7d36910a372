"""README.md of a quantized folder: what was done to the weights, for people and for model hubs."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from pathlib import Path

from retnet_tools import __version__
from retnet_tools.graph.contract import MANIFEST_FILE, WEIGHTS_FILE
from retnet_tools.graph.manifest import Manifest, read_manifest
from retnet_tools.graph.quantization import Quality, Quantization
from retnet_tools.quantize.scheme import matrix_formats, scheme_text

CARD_FILE = "README.md"


def model_card(manifest: Manifest) -> str:
    """The card of a folder whose manifest has a quantization record."""
    record, config = manifest.quantization, manifest.config
    if record is None:
        raise ValueError("a manifest of float weights")
    parameters = f"{config.num_layers} layers, {config.num_heads} heads, hidden size {config.hidden_size}"
    lines = [
        "---",
        "library_name: onnx",
        "tags: [retnet, onnx, onnxruntime, quantized]",
        "---",
        "# RetNet, quantized",
        "",
        f"A RetNet ({parameters}, vocabulary {config.vocab_size}) as a stateful ONNX decoder, written by "
        f"retnet-tools {__version__} from {manifest.provenance.get('source_format', 'a checkpoint')}.",
        "",
        "## Weights",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in _facts(manifest, record)),
        "",
        f"`{WEIGHTS_FILE}` holds w = (code - zero point) * scale, a block of neighbours along the inputs of a layer "
        "sharing scale and zero point. Norms, biases, tables and recurrent states are not quantized.",
    ]
    if record.calibration is not None:
        seen = record.calibration
        lines += ["", f"Calibrated on {seen.tokens} tokens of `{seen.text}` (sha256 {seen.sha256})."]
    if record.quality is not None:
        lines += ["", "## Quality", "", *_quality(record.quality)]
    lines += [
        "",
        "`retnet.json` holds the configuration, the inputs and outputs of each graph, and where it all comes from.",
    ]
    return "\n".join(lines) + "\n"


def update_record(folder: Path, record: Quantization) -> None:
    """Put another quantization record, such as one with quality figures, into a folder's manifest and card.

    Raises:
        InputError: not an exported folder.
    """
    manifest = dataclasses.replace(read_manifest(folder), quantization=record)
    for name, text in ((CARD_FILE, model_card(manifest)), (MANIFEST_FILE, manifest.to_json())):
        partial = folder / f".{name}.partial-{os.getpid()}"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, folder / name)


def _facts(manifest: Manifest, record: Quantization) -> list[tuple[str, str]]:
    scheme = record.scheme
    kinds = Counter(
        manifest.dtype if format is None else f"int{format.bits}"
        for format in matrix_formats(scheme, manifest.config).values()
    )
    share = record.weight_bytes / record.float_bytes
    return [
        ("scheme", f"`{_escaped(scheme_text(scheme))}`"),
        ("matrices", ", ".join(f"{count} {kind}" for kind, count in kinds.items())),
        ("size", f"{record.weight_bytes / 1e6:.1f} MB, {share:.1%} of {record.float_bytes / 1e6:.1f} MB"),
        ("activations", manifest.dtype),
        ("states", manifest.state_dtype),
        ("graphs", ", ".join(f"`{name}`" for name in manifest.graphs)),
        ("operators", manifest.ops),
    ]


def _quality(quality: Quality) -> list[str]:
    return [
        f"On {quality.tokens} tokens of `{quality.text}` (sha256 {quality.sha256}):",
        "",
        "| | quantized | float |",
        "| --- | --- | --- |",
        f"| perplexity | {quality.perplexity:.4f} | {quality.float_perplexity:.4f} |",
        "",
        f"Mean KL divergence {quality.mean_kl:.2e} nats a token; same most likely token at {quality.same_top:.2%}.",
    ]


def _escaped(text: str) -> str:
    """As the cell of a table."""
    return re.sub(r"\|", r"\\|", text)
