"""What `export` and `quantize` report."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from retnet_tools.graph.code_types import HALF_TYPES
from retnet_tools.graph.quantization import Quality
from retnet_tools.jobs.export import ExportResult
from retnet_tools.quantize.options import scheme_text

SCHEMA_VERSION = 1


def export_document(result: ExportResult) -> dict[str, Any]:
    """An export as a JSON document; sizes in bytes. `quality` is what quantization cost, where it was measured."""
    plan = result.plan
    record, quality = plan.quantization, result.quality
    return {
        "schema_version": SCHEMA_VERSION,
        "request": result.request.to_dict(),
        "written": not result.request.dry_run,
        "output": str(result.folder),
        "source_format": plan.checkpoint.format,
        "dtype": plan.dtype,
        "state_dtype": plan.state_dtype,
        "ops": plan.ops,
        "opset": plan.opset,
        "device": plan.device,
        "graphs": {name: {"nodes": sum(1 for _ in built.graph.all_nodes())} for name, built in plan.graphs.items()},
        "quantization": None if record is None else {"summary": scheme_text(record.scheme), **record.to_dict()},
        "weight_bytes": plan.weight_bytes,
        "position_table_bytes": result.position_table_bytes,
        "state_bytes_per_sequence": result.state_bytes,
        "tokenizer_files": list(plan.text.tokenizer_files),
        "settings_files": [n for n in {**plan.text.made, **plan.files} if n not in plan.text.tokenizer_files],
        "notes": list(result.notes),
        "quality": None if quality is None else asdict(quality),
    }


def render_export(result: ExportResult) -> None:
    """Print the same for people: a line a fact."""
    document = export_document(result)
    verb, graphs = "wrote" if document["written"] else "would write", document["graphs"]
    operators = f"{document['ops']} operators" + (" for CUDA" if document["device"] == "cuda" else "")
    lines = [
        f"{verb} {document['output']} from {document['source_format']}",
        *(f"  {name:<13} {graph['nodes']} nodes, {operators}" for name, graph in graphs.items()),
        f"  weights.data  {document['weight_bytes'] / 1e6:.1f} MB, {_weights(document)}",
        f"  states        {document['state_bytes_per_sequence'] / 1e6:.2f} MB a sequence at any length, "
        f"{document['state_dtype']}",
    ]
    if document["settings_files"]:
        lines.append(f"  settings      {', '.join(document['settings_files'])}")
    if document["tokenizer_files"]:
        lines.append(f"  tokenizer     {', '.join(document['tokenizer_files'])}")
    if result.quality is not None:
        lines.append(_quality_text(result.quality))
    lines += [f"  note: {note}" for note in document["notes"]]
    print("\n".join(lines))


def _weights(document: dict[str, Any]) -> str:
    record = document["quantization"]
    if record is None:
        return str(document["dtype"])
    share = record["weight_bytes"] / record["float_bytes"]
    before = "float32" if record["scheme"]["type"] in HALF_TYPES else document["dtype"]
    return f"{share:.1%} of {before}: {record['summary']}"


def _quality_text(quality: Quality) -> str:
    """The figures in a line."""
    change = quality.perplexity / quality.float_perplexity - 1
    return (
        f"  quality       PPL {quality.perplexity:.2f}, float {quality.float_perplexity:.2f} ({change:+.2%}); mean KLD "
        f"{quality.mean_kl:.2e}; same top p {quality.same_top:.2%} ({quality.tokens:,} tokens of {quality.text})"
    )
