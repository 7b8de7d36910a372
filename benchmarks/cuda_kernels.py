"""Makes retnet_tools/graph/data/cuda_kernels.json from a list of all kernels of a build of onnxruntime's CUDA provider.

    python benchmarks/cuda_kernels.py LIST.json VERSION

LIST.json holds `[domain, operator, [from, to], {type constraint: [types]}]` for every kernel, as the registry of the
build has them. Kept are those that a graph of the opset that exports use can meet, types by their short names; and for
operators outside ai.onnx the type constraints of their inputs and outputs, which onnx does not know.
"""

import json
import sys
from pathlib import Path

import onnx
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from retnet_tools.graph.contract import OPSET
from retnet_tools.graph.ops import MICROSOFT

OUT = Path(__file__).parent.parent / "retnet_tools" / "graph" / "data" / "cuda_kernels.json"
NEWEST = 2**31 - 1


def since_version(domain: str, operator: str) -> int | None:
    """The version of an operator in the opset that exports use."""
    if domain == MICROSOFT:
        return 1
    if domain or not onnx.defs.has(operator, OPSET, domain):
        return None
    return int(onnx.defs.get_schema(operator, OPSET, domain).since_version)


def kept(domain: str, operator: str, versions: list[int]) -> bool:
    """Whether ONNX Runtime takes the kernel for that version: its first one, or one up to an end that it names."""
    since, (first, last) = since_version(domain, operator), versions
    return since is not None and (first == since or (last != NEWEST and first <= since <= last))


kernels: dict[str, list[dict[str, list[str]]]] = {}
for domain, operator, versions, constraints in json.loads(Path(sys.argv[1]).read_text()):
    if kept(domain, operator, versions):
        types = {
            name: sorted(t.removeprefix("tensor(").rstrip(")") for t in allowed if t.startswith("tensor("))
            for name, allowed in sorted(constraints.items())
        }
        kernels.setdefault(f"{domain}.{operator}" if domain else operator, []).append(types)
signatures = {
    f"{MICROSOFT}.{schema.name}": [[port.typeStr for port in ports] for ports in (schema.inputs, schema.outputs)]
    for schema in get_all_operator_schema()
    if schema.domain == MICROSOFT and f"{MICROSOFT}.{schema.name}" in kernels
}


def table(rows: dict[str, object]) -> str:
    """A JSON object with a line for each entry."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows))
    return f"{{\n{lines}\n}}"


header = f'"onnxruntime": {json.dumps(sys.argv[2])}, "opset": {OPSET}'
OUT.write_text(f'{{{header}, "kernels": {table(kernels)}, "signatures": {table(signatures)}}}\n')
print(f"{OUT}: {sum(map(len, kernels.values()))} kernels of {len(kernels)} operators")
