"""README.md of a quantized folder: what was done to the weights, for people and for model hubs."""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from retnet_tools.errors import UsageError
from retnet_tools.file_records import FileRecord
from retnet_tools.graph.contract import CARD_FILE, CARD_TITLE, MANIFEST_FILE, WEIGHTS_FILE
from retnet_tools.graph.manifest import Manifest, read_manifest
from retnet_tools.graph.quantization import Calibration, MixedPrecision, Quantization
from retnet_tools.inputs import read_input
from retnet_tools.quantize.options import matrix_formats, matrix_names, scheme_text
from retnet_tools.staging import staged_folder
from retnet_tools.version import __version__

_MOST_SENSITIVE = 5
"""Matrices that the card names."""
_FRONT_MATTER = f"""---
library_name: onnx
tags: [retnet, onnx, onnxruntime, quantized]
---
{CARD_TITLE}"""
_BLOCK_LAYOUT = (
    f"`{WEIGHTS_FILE}` holds w = (code - zero point) * scale, a block of neighbours along the inputs of a layer "
    "sharing scale and zero point. Norms, biases, tables and recurrent states are not quantized."
)
_HALF_LAYOUT = (
    f"`{WEIGHTS_FILE}` holds every weight rounded to {{dtype}}. Decay, phases and position tables stay float32."
)


def model_card(manifest: Manifest) -> str:
    """The card of a folder whose manifest has a quantization record."""
    record, config = manifest.quantization, manifest.config
    if record is None:
        raise ValueError("a manifest of float weights")
    parameters = f"{config.num_layers} layers, {config.num_heads} heads, hidden size {config.hidden_size}"
    parts = [
        _FRONT_MATTER,
        f"A RetNet ({parameters}, vocabulary {config.vocab_size}) as a stateful ONNX decoder, written by "
        f"retnet-tools {__version__} from {manifest.provenance.get('source_format', 'a checkpoint')}.",
        "## Weights",
        _table(("", ""), _facts(manifest, record)),
        _HALF_LAYOUT.format(dtype=manifest.dtype) if record.blocks is None else _BLOCK_LAYOUT,
    ]
    if record.coarse_blocks:
        parts.append(f"{coarse_text(record, manifest.dtype)}.")
    if record.calibration is not None:
        parts.append(f"Calibrated on {_tokens(record.calibration)}.")
    if record.mixed_precision is not None:
        parts += _sensitivities(record.mixed_precision)
    if (quality := record.quality) is not None:
        perplexities = ("perplexity", f"{quality.perplexity:.4f}", f"{quality.float_perplexity:.4f}")
        parts += [
            "## Quality",
            f"On {quality.tokens} tokens of `{quality.text}` (sha256 {quality.sha256}):",
            _table(("", "quantized", "float"), [perplexities]),
            f"Mean KL divergence {quality.mean_kl:.2e} nats a token; same most likely token at {quality.same_top:.2%}.",
        ]
    parts.append(
        "`retnet.json` holds the configuration, the inputs and outputs of each graph, and where it all comes from."
    )
    return "\n\n".join(parts) + "\n"


def check_card(out: Path) -> None:
    """Check that a card would not take the place of a README that somebody else wrote.

    Raises:
        UsageError: it would.
        InputError: what lies there is no file.
    """
    card = out / CARD_FILE
    if card.exists() and CARD_TITLE not in read_input(card).decode(errors="replace").splitlines():
        raise UsageError(
            f"{card} is no card that this command wrote",
            "its place for one",
            "move it away, or name another -o",
        )


def coarse_text(record: Quantization, dtype: str) -> str:
    """What `coarse_blocks` means, for people."""
    return (
        f"{record.coarse_blocks} blocks have weights so small that their scale is below the normal numbers of {dtype}: "
        "it is inexact, or 0"
    )


def update_record(folder: Path, record: Quantization) -> None:
    """Put another quantization record, such as one with quality figures, into a folder's manifest and card.

    Raises:
        InputError: not an exported folder.
        UsageError: as `check_card`.
    """
    check_card(folder)
    manifest = dataclasses.replace(read_manifest(folder), quantization=record)
    with staged_folder(folder, marker=MANIFEST_FILE, required_bytes=0, force=True) as partial:
        (partial / CARD_FILE).write_text(model_card(manifest), encoding="utf-8")
        if manifest.files:
            files = {**manifest.files, CARD_FILE: FileRecord.of(partial / CARD_FILE)}
            manifest = dataclasses.replace(manifest, files=files)
        (partial / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")


def _facts(manifest: Manifest, record: Quantization) -> list[tuple[str, str]]:
    scheme, blocks, matrices = record.scheme, record.blocks, matrix_names(manifest.config)
    formats = dict.fromkeys(matrices) if blocks is None else matrix_formats(blocks, manifest.config)
    kinds = Counter(manifest.dtype if format is None else format.type.name for format in formats.values())
    share = record.weight_bytes / record.float_bytes
    return [
        ("scheme", f"`{scheme_text(scheme)}`"),
        ("matrices", ", ".join(f"{count} {kind}" for kind, count in kinds.items())),
        ("size", f"{record.weight_bytes / 1e6:.1f} MB, {share:.1%} of {record.float_bytes / 1e6:.1f} MB"),
        ("activations", manifest.dtype),
        ("states", manifest.state_dtype),
        ("graphs", ", ".join(f"`{name}`" for name in manifest.graphs)),
        ("operators", manifest.ops),
    ]


def _tokens(text: Calibration) -> str:
    drawn = "" if text.sequence is None else f" in sequences of {text.sequence}, drawn with seed {text.seed}"
    ids = "" if text.ids_sha256 is None else f", token ids {text.ids_sha256[:12]}"
    return f"{text.tokens} tokens of `{text.text}` (sha256 {text.sha256}){drawn}{ids}"


def _sensitivities(mixed: MixedPrecision) -> list[str]:
    target = f"{mixed.target_bits:g} bits a weight" if mixed.target_size is None else f"{mixed.target_size} bytes"
    worst = heapq.nlargest(_MOST_SENSITIVE, mixed.sensitivities, key=lambda found: found.mean_kl)
    return [
        f"Types were chosen to keep to {target}, by the KL divergence that each matrix alone causes on "
        f"{_tokens(mixed.text)}: {mixed.predicted_kl:.2e} nats a token predicted for all together, "
        f"{mixed.measured_kl:.2e} measured, rounded to nearest. The most sensitive (`retnet.json` has all):",
        _table(
            ("matrix", "type", "mean KL divergence"),
            [(", ".join(found.matrices), found.type, f"{found.mean_kl:.2e}") for found in worst],
        ),
    ]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(" ".join(["|", *(f"{cell} |".lstrip() for cell in line)]) for line in escaped)
