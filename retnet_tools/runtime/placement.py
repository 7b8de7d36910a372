"""Where ONNX Runtime placed each node of a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime

CPU = "CPUExecutionProvider"
RECORD_PLACEMENT = ("session.record_ep_graph_assignment_info", "1")
"""The session option without which ONNX Runtime forgets where it placed what."""


@dataclass(frozen=True)
class Placement:
    """The nodes of each provider: name to operator, subgraphs included.

    ONNX Runtime notes them when it has shared them out, before it merges nodes of one provider; nodes that it folded
    into constants by then are gone.
    """

    nodes: Mapping[str, Mapping[str, str]]

    @property
    def counts(self) -> dict[str, int]:
        """Nodes of each provider that has any, by its name without `ExecutionProvider`."""
        return {name.removesuffix("ExecutionProvider"): len(nodes) for name, nodes in self.nodes.items() if nodes}

    def on_cpu(self, allowed: Collection[str] = ()) -> Counter[str]:
        """Operators on the CPU with their numbers, without the nodes that may be there."""
        return Counter(operator for name, operator in self.nodes.get(CPU, {}).items() if name not in allowed)


def node_placement(session: onnxruntime.InferenceSession) -> Placement:
    """The placement of a session that was opened with `RECORD_PLACEMENT`."""
    nodes: dict[str, dict[str, str]] = {}
    for part in session.get_provider_graph_assignment_info():
        own = nodes.setdefault(part.ep_name, {})
        for node in part.get_nodes():
            own[node.name or f"unnamed {len(own)}"] = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return Placement(nodes)
