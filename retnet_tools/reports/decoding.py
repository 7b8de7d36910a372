"""What `export` and `generate` report."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retnet_tools.evaluate.quality import quality_text
from retnet_tools.graph.contract import state_shape
from retnet_tools.graph.export import ExportPlan, kernel_notes
from retnet_tools.graph.nodes import ELEMENT_TYPES
from retnet_tools.graph.quantization import HALF_TYPES, Quality
from retnet_tools.quantize.card import coarse_text
from retnet_tools.quantize.options import scheme_text
from retnet_tools.runtime.bulk import BulkSummary
from retnet_tools.runtime.decode import Generations

SCHEMA_VERSION = 1


def export_document(plan: ExportPlan, out: Path, *, written: bool, quality: Quality | None = None) -> dict[str, Any]:
    """The export as a JSON document; sizes in bytes. `quality` is what quantization cost, where it was measured."""
    config, record = plan.checkpoint.config, plan.quantization
    tables = sum(tensor.stored_bytes for tensor in plan.tensors.values() if tensor.table is not None)
    state = config.num_layers * math.prod(state_shape(config)) * ELEMENT_TYPES[plan.state_dtype].numpy().itemsize
    coarse = () if record is None or not record.coarse_blocks else (coarse_text(record, plan.dtype),)
    return {
        "schema_version": SCHEMA_VERSION,
        "written": written,
        "output": str(out),
        "source_format": plan.checkpoint.format,
        "dtype": plan.dtype,
        "state_dtype": plan.state_dtype,
        "ops": plan.ops,
        "device": plan.device,
        "graphs": {name: {"nodes": sum(1 for _ in built.graph.all_nodes())} for name, built in plan.graphs.items()},
        "quantization": None if record is None else {"summary": scheme_text(record.scheme), **record.to_dict()},
        "weight_bytes": plan.weight_bytes,
        "position_table_bytes": tables,
        "state_bytes_per_sequence": state,
        "tokenizer_files": list(plan.text.tokenizer_files),
        "settings_files": [n for n in {**plan.text.made, **plan.files} if n not in plan.text.tokenizer_files],
        "notes": [*plan.notes, *coarse, *kernel_notes(plan)],
        "quality": None if quality is None else asdict(quality),
    }


def export_text(document: dict[str, Any]) -> str:
    """The same for people: a line a fact."""
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
    if document["quality"] is not None:
        lines.append(quality_text(Quality(**document["quality"])))
    lines += [f"  note: {note}" for note in document["notes"]]
    return "\n".join(lines)


def _weights(document: dict[str, Any]) -> str:
    record = document["quantization"]
    if record is None:
        return str(document["dtype"])
    share = record["weight_bytes"] / record["float_bytes"]
    before = "float32" if record["scheme"]["type"] in HALF_TYPES else document["dtype"]
    return f"{share:.1%} of {before}: {record['summary']}"


def generation_document(result: Generations) -> dict[str, Any]:
    """A generation as a JSON document: the first sample at the top, all of them in `samples`."""
    samples = [{"text": row.text, "tokens": list(row.tokens), "stop_reason": row.stop_reason} for row in result.rows]
    return {
        "schema_version": SCHEMA_VERSION,
        **samples[0],
        "prompt_tokens": result.prompt_tokens,
        "prompt_tokens_per_second": result.prompt_tokens_per_second,
        "tokens_per_second": result.tokens_per_second,
        "samples": samples,
    }


def generation_speed(result: Generations) -> str:
    """The speed of a generation in one line."""
    reasons = ", ".join(sorted({row.stop_reason for row in result.rows}))
    return (
        f"prompt {result.prompt_tokens} tokens, {result.prompt_tokens_per_second:.1f} tokens/s; "
        f"generated {sum(len(row.tokens) for row in result.rows)} tokens, {result.tokens_per_second:.1f} tokens/s; "
        f"stopped at {reasons}"
    )


def bulk_document(summary: BulkSummary, output: Path) -> dict[str, Any]:
    """A bulk run as a JSON document."""
    return {"schema_version": SCHEMA_VERSION, "output": str(output), **asdict(summary)}


def bulk_text(summary: BulkSummary, output: Path) -> str:
    """The same in a line."""
    rate = summary.tokens / summary.seconds if summary.seconds else 0.0
    return (
        f"{output}: {summary.written} answers written, {summary.errors} of them errors, {summary.skipped} were there; "
        f"{summary.tokens} tokens, {rate:.1f} tokens/s"
    )
