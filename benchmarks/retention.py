"""Retention of one token by each form that a graph for CUDA could take, at the heads of published models.

    python benchmarks/retention.py --device cuda -o benchmarks/gpu/retention.json

For each head size and batch: LinearAttention as it is, with split keys, and as matrix products; kernel by kernel and as
a CUDA graph. `chosen` marks the form that `export --device cuda` takes (`retnet_tools.graph.cuda_ops`): where
another one is faster, its table is wrong. A graph holds `--layers` of it, each with states of its own, so that they are
more than a cache holds and a call costs little beside them; times are of one layer: medians over `--rounds` of the mean
of `--steps` calls, states in two sets of buffers. `gb_per_second` counts the states once read and once written,
whatever a form does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from retnet_tools.graph.contract import TensorSpec
from retnet_tools.graph.cuda_ops import CudaFusedOps, step_form
from retnet_tools.graph.decay import StepDecay
from retnet_tools.graph.nodes import GraphBuilder, graph_value, tensor_type
from retnet_tools.graph.ops import FusedOps, StandardOps
from retnet_tools.machine import this_machine
from retnet_tools.paper import paper_decay
from retnet_tools.runtime.buffers import Binding, zero_buffer
from retnet_tools.runtime.onnx_session import open_session
from retnet_tools.runtime.providers import Device, check_device, parse_device

HEADS = [(8, 256, 512), (8, 256, 432), (16, 256, 512), (16, 256, 432), (8, 160, 320), (16, 128, 256), (8, 64, 128)]
"""H x K x V: the paper's, torchscale's 1.3b and 6.7b, syncdoth's 300m, and smaller ones."""
PARTS = (2, 4, 8)

Form = Callable[..., tuple[ir.Value, ir.Value]]


@dataclass(frozen=True)
class Stack:
    """Retention of several layers as a graph of its own: one q, k and v for all, and the sum of their outputs.

    Attributes:
        tokens: of each sequence in a call.
    """

    form: Form
    layers: int
    heads: int
    k: int
    v: int
    tokens: int = 1

    @property
    def inputs(self) -> list[TensorSpec]:
        sizes = (("q", self.k), ("k", self.k), ("v", self.v))
        return [
            TensorSpec("position_ids", "int64", ("batch", self.tokens)),
            *(TensorSpec(name, "float32", ("batch", self.tokens, self.heads * size)) for name, size in sizes),
        ]

    @property
    def output(self) -> TensorSpec:
        return TensorSpec("output", "float32", ("batch", self.tokens, self.heads * self.v))

    def states(self, kind: str) -> list[TensorSpec]:
        shape = ("batch", self.heads, self.k, self.v)
        return [TensorSpec(f"{kind}.{i}", "float32", shape) for i in range(self.layers)]

    def write(self, path: Path) -> None:
        g, values = GraphBuilder(), [graph_value(spec) for spec in self.inputs]
        position_ids, query, key, value = values
        past = [graph_value(spec) for spec in self.states("past")]
        decay = StepDecay(np.array(paper_decay(self.heads)), position_ids)
        outputs, present = [], []
        for i, state in enumerate(past):
            g.scope = f"layers.{i}"
            output, state = self.form(g, query, key, value, state, decay)
            outputs.append(output)
            present.append(state)
        g.scope = ""
        results = [g.op("Sum", *outputs), *present]
        for result, spec in zip(results, (self.output, *self.states("present")), strict=True):
            result.name, result.shape, result.type = spec.name, ir.Shape(spec.shape), tensor_type("float32")
        graph = ir.Graph(
            [*values, *past],
            results,
            nodes=g.nodes,
            initializers=list(g.initializers.values()),
            opset_imports=dict(FusedOps.opsets),
            name="retention",
        )
        ir.save(ir.Model(graph, ir_version=11), path)

    def bindings(self, batch: int, device: Device, *, captured: bool) -> list[Binding]:
        """Of a call from either set of states to the other."""
        rng = np.random.default_rng(0)
        feeds = {
            spec.name: np.broadcast_to(np.arange(self.tokens), (batch, self.tokens))
            if spec.dtype == "int64"
            else 0.1 * rng.standard_normal((batch, *map(int, spec.shape[1:])), dtype=np.float32)
            for spec in self.inputs
        }
        shape = (batch, self.heads, self.k, self.v)
        sets = [[zero_buffer(shape, "float32", device) for _ in range(self.layers)] for _ in range(2)]
        with tempfile.TemporaryDirectory() as scratch:
            self.write(Path(scratch) / "step.onnx")
            session = open_session(Path(scratch) / "step.onnx", device, 1, cuda_graph=captured)
        names = [[spec.name for spec in self.states(kind)] for kind in ("past", "present")]
        found = []
        for number, (read, written) in enumerate((sets, sets[::-1]), start=1):
            past, present = (
                dict(zip(own, part, strict=True)) for own, part in zip(names, (read, written), strict=True)
            )
            graph_id = number if captured else None
            found.append(Binding(session, feeds, past, present, self.output, device, graph_id))
        return found


def split(parts: int) -> Form:
    """LinearAttention over heads cut into so many parts."""

    def make(g: GraphBuilder, q: ir.Value, k: ir.Value, v: ir.Value, past: ir.Value, decay: StepDecay) -> Any:
        cut = StepDecay(np.repeat(decay.log_gamma, parts), decay.position_ids)
        return CudaFusedOps().split_keys(g, q, k, v, past, cut.rows(g), parts)

    return make


def forms(k: int) -> dict[str, Form]:
    """Every form that heads of K can take."""
    found: dict[str, Form] = {"operator": FusedOps().retention_step, "products": StandardOps().retention_step}
    return found | {f"split/{parts}": split(parts) for parts in PARTS if k % parts == 0 and k // parts >= 32}


def chosen_form(k: int, v: int) -> str:
    """The form that an export takes."""
    form = step_form(k, v)
    if form.kernel is None:
        return "products"
    return "operator" if form.key_splits == 1 else f"split/{form.key_splits}"


def microseconds(stack: Stack, batch: int, device: Device, steps: int, rounds: int, *, captured: bool) -> float:
    """One call for a batch, a layer."""
    bindings = stack.bindings(batch, device, captured=captured)
    for n in range(6):
        bindings[n % 2].run({}, fetch=False)
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        for n in range(steps):
            bindings[n % 2].run({}, fetch=False)
        times.append((time.perf_counter() - began) / steps / stack.layers)
    return 1e6 * statistics.median(times)


def measured(stack: Stack, batch: int, device: Device, steps: int, rounds: int) -> dict[str, Any]:
    """Times of a form, or why it does not run."""
    row: dict[str, Any] = {}
    try:
        row["us"] = best = microseconds(stack, batch, device, steps, rounds, captured=False)
        if device.kind == "cuda":
            row["us_captured"] = best = microseconds(stack, batch, device, steps, rounds, captured=True)
        row["gb_per_second"] = 8 * batch * stack.heads * stack.k * stack.v / best / 1e3
    except Exception as error:
        row["failed"] = " ".join(str(error).split())[-200:]
    return row


def write_rows(output: Path | None, device: Device, rows: list[dict[str, Any]], **setting: int) -> None:
    """Write what was measured, and on what, where a file was named."""
    if output is not None:
        document = {"device": str(device), "machine": asdict(this_machine()), **setting, "rows": rows}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--heads", default=",".join("x".join(map(str, heads)) for heads in HEADS))
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    device, rows = parse_device(arguments.device), []
    check_device(device)
    for text in arguments.heads.split(","):
        heads, k, v = map(int, text.split("x"))
        for name, form in forms(k).items():
            for batch in map(int, arguments.batches.split(",")):
                row = {
                    "heads": heads,
                    "k": k,
                    "v": v,
                    "batch": batch,
                    "form": name,
                    "chosen": name == chosen_form(k, v),
                }
                stack = Stack(form, arguments.layers, heads, k, v)
                row |= measured(stack, batch, device, arguments.steps, arguments.rounds)
                rows.append(row)
                print(json.dumps(row), flush=True)
    write_rows(arguments.output, device, rows, layers=arguments.layers)


if __name__ == "__main__":
    main()
