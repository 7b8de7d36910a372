"""What `inspect` shows: to people, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from retnet_tools.console import ResultTable, print_line, result_console
from retnet_tools.evaluate.lint import SEVERITIES, Severity, counted, gamma_text
from retnet_tools.graph.contract import WEIGHTS_FILE
from retnet_tools.jobs.inspect import InspectResult, StoredModel
from retnet_tools.quantize.options import scheme_text

SCHEMA_VERSION = 1
_COLOURS: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "info": "cyan"}
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_SCHEDULES = ("decay", "key_decay", "rotary_frequencies")


def inspection_document(result: InspectResult) -> dict[str, Any]:
    """The JSON document of `retnet-tools inspect`; an endless half-life or horizon is null."""
    model = result.model
    return {
        "schema_version": SCHEMA_VERSION,
        "request": result.request.to_dict(),
        "path": str(model.path),
        "kind": "checkpoint" if model.manifest is None else "export",
        "format": model.format,
        "files": [{"name": file.name, "bytes": size} for file, size in model.files.items()],
        "tokenizer_files": [file.name for file in model.tokenizer_files],
        "config": model.config.to_dict(),
        "parameters": {**result.parameters, "total": sum(result.parameters.values())},
        "tensors": result.tensors,
        "bytes_by_dtype": dict(result.bytes_by_dtype),
        "state": {
            "dtype": model.state_dtype,
            "bytes_per_layer": result.state_bytes,
            "bytes_per_sequence": model.config.num_layers * result.state_bytes,
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
        "export": _export_fields(model),
        "lint": {
            "data_read": not result.request.quick,
            "counts": {severity: result.count(severity) for severity in SEVERITIES},
            "findings": [asdict(finding) for finding in result.findings],
        },
        "checks": [
            {"name": check.file.name, "how": check.how, "problem": check.problem or None} for check in result.checks
        ],
        "notes": list(model.notes),
    }


def render_inspection(result: InspectResult) -> None:
    """Print format, configuration, sizes, the memory of each head and what lint found."""
    console = result_console()
    for line in _facts(result):
        print_line(console, line)
    _render_config(console, result)
    _render_parameters(console, result)
    _render_heads(console, result)
    _render_findings(console, result)
    for check in result.checks:
        good = "good" if check.how != "none" else "says nothing of itself"
        print_line(console, f"check    {check.file.name}: {check.problem or good} ({check.how})")
    for note in result.model.notes:
        print_line(console, f"note: {note}")


def size_text(size: int) -> str:
    """Bytes in decimal units."""
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:.{1 if size >= 10 * unit else 2}f} {name}"
    return f"{size} bytes"


def tokens_text(tokens: float) -> str:
    """A number of tokens; `never` for infinity."""
    if math.isinf(tokens):
        return "never"
    return f"{tokens:.2e}" if tokens >= 1e9 else f"{tokens:,.1f}"


def _facts(result: InspectResult) -> Iterator[str]:
    model, layers = result.model, result.model.config.num_layers
    types = ", ".join(f"{size_text(size)} {name}" for name, size in result.bytes_by_dtype.items())
    yield f"{model.path}: {model.format}"
    files = ", ".join(f"{file.name} ({size_text(size)})" for file, size in model.files.items())
    yield f"files    {files}"
    if model.tokenizer_files:
        yield f"         {', '.join(file.name for file in model.tokenizer_files)}"
    where = f" in {WEIGHTS_FILE}" if model.manifest else ""
    yield f"tensors  {result.tensors}{where}, {types}"
    per_layer = f"{size_text(result.state_bytes)} in each of {layers} layers"
    in_all = size_text(layers * result.state_bytes)
    yield f"state    {in_all} a sequence at any length, {model.state_dtype}; {per_layer}"
    if (manifest := model.manifest) is None:
        return
    record = manifest.quantization
    weights = f"{manifest.dtype} weights, not quantized" if record is None else f"{manifest.dtype} activations"
    yield f"export   {weights}, {manifest.ops} operators of opset {manifest.opset}"
    if record is not None:
        share = record.weight_bytes / record.float_bytes
        yield f"weights  {scheme_text(record.scheme)}; {share:.1%} of {size_text(record.float_bytes)} in float"
    source = manifest.provenance
    yield f"source   {source.get('source_format')}, written by retnet-tools {source.get('retnet_tools')}"
    for name, operators in model.node_counts.items():
        yield f"{name}: {sum(operators.values())} nodes: {', '.join(f'{n} {op}' for op, n in operators.items())}"


def _render_config(console: Console, result: InspectResult) -> None:
    table = ResultTable("configuration", "")
    for name, value in result.model.config.to_dict().items():
        if name not in _SCHEDULES:
            table.add_row(name, Text(_flat(value)))
    config = result.model.config
    frequencies, pairs = config.rotary_frequencies, config.head_k_dim // 2
    counted_pairs = f"{pairs} in each of {config.num_heads} heads" if config.has_head_rotation else str(pairs)
    table.add_row("rotary_frequencies", f"{counted_pairs}, {frequencies[0]:.6g} to {frequencies[-1]:.6g}")
    _print_table(console, table)


def _render_parameters(console: Console, result: InspectResult) -> None:
    total = sum(result.parameters.values())
    table = ResultTable("parameters", "count", "share", right_from=1)
    for part, count in result.parameters.items():
        tied = part == "output head" and result.model.config.tie_word_embeddings
        table.add_row(f"{part} (tied)" if tied else part, f"{count:,}", f"{count / total:.1%}")
    table.add_row("total", f"{total:,}", "")
    _print_table(console, table)


def _render_heads(console: Console, result: InspectResult) -> None:
    table = ResultTable("head", "gamma", "half-life", "1% horizon (tokens)", right_from=2)
    for head in result.heads:
        half_life, horizon = tokens_text(head.half_life), tokens_text(head.horizon)
        table.add_row(head.head, gamma_text(head.log_gamma), half_life, horizon)
    _print_table(console, table)


def _render_findings(console: Console, result: InspectResult) -> None:
    console.print()
    looked = (
        "names and configuration only, no tensor data read" if result.request.quick else f"{result.tensors} tensors"
    )
    counts = ", ".join(counted(result.count(word), word) for word in SEVERITIES if result.count(word))
    print_line(console, f"lint: {counts or 'nothing found'} ({looked})")
    for finding in result.findings:
        line = Text.assemble((finding.severity, _COLOURS[finding.severity]), f" {finding.check}: {finding.message}")
        console.print(line, soft_wrap=not console.is_terminal)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(item)}" for name, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def _print_table(console: Console, table: Any) -> None:
    console.print()
    console.print(table)


def _export_fields(model: StoredModel) -> dict[str, Any] | None:
    manifest = model.manifest
    if manifest is None:
        return None
    return {
        "dtype": manifest.dtype,
        "state_dtype": manifest.state_dtype,
        "ops": manifest.ops,
        "opset": manifest.opset,
        "quantization": None if manifest.quantization is None else manifest.quantization.to_dict(),
        "provenance": manifest.provenance,
        "graphs": {
            name: {"nodes": sum(ops.values()), "operators": dict(ops)} for name, ops in model.node_counts.items()
        },
    }
