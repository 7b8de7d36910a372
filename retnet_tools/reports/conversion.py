"""What `convert` reports."""

from __future__ import annotations

from typing import Any

from retnet_tools.console import ResultTable, print_line, result_console
from retnet_tools.jobs.convert import ConvertResult


def conversion_document(result: ConvertResult) -> dict[str, Any]:
    """The conversion as a JSON document; sizes in bytes."""
    request, plan = result.request, result.conversion
    files = plan.weights
    return {
        "schema_version": 1,
        "request": request.to_dict(),
        "written": not request.dry_run,
        "output": str(request.output),
        "source_format": result.checkpoint.format,
        "target_format": request.to,
        "tensor_bytes": plan.nbytes,
        "memory_bytes": sum(plan.largest),
        "files": {name: sum(t.nbytes for t in tensors if t.same_as is None) for name, tensors in files.items()},
        "other_files": [name for name in plan.files if name not in files],
        "tensors": [
            {
                "name": tensor.name,
                "canonical": plan.canonical[tensor.name],
                "shape": list(tensor.shape),
                "dtype": tensor.dtype.name,
            }
            for tensors in files.values()
            for tensor in tensors
        ],
        "notes": list(plan.notes),
    }


def render_conversion(document: dict[str, Any]) -> None:
    """Print the conversion; a dry run also prints the names."""
    console = result_console()
    verb = "wrote" if document["written"] else "would write"
    print_line(
        console,
        f"{verb} {document['output']} ({document['target_format']}) from {document['source_format']}: "
        f"{len(document['tensors'])} tensors, {document['tensor_bytes'] / 1e6:.1f} MB",
    )
    for name, size in document["files"].items():
        print_line(console, f"  {name}  {size / 1e6:.1f} MB")
    for name in document["other_files"]:
        print_line(console, f"  {name}")
    if not document["written"]:
        print_line(console, f"memory for tensors: at most {document['memory_bytes'] / 1e6:.1f} MB")
        table = ResultTable("name in the file", "canonical name", "shape", "type")
        for tensor in document["tensors"]:
            shape = " x ".join(map(str, tensor["shape"]))
            table.add_row(tensor["name"], tensor["canonical"] or "(buffer)", shape, tensor["dtype"])
        console.print(table)
    for note in document["notes"]:
        print_line(console, f"note: {note}")
