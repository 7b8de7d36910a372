"""The change that CONTRIBUTING describes: another operator for a part of the model, and a set that uses it.

Two rows of a class and one of a device: silu by Softplus, and the step of retention by Einsum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx_ir import Value

from retnet_tools.config import Activation
from retnet_tools.graph import contract, manifest
from retnet_tools.graph.decay import StepDecay
from retnet_tools.graph.export import plan_of_export
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.graph.nodes import GraphBuilder, Pair
from retnet_tools.graph.ops import Fragment, StandardOps
from retnet_tools.graph.targets import TARGET_DEVICES
from retnet_tools.model.retention import retention_recurrent
from retnet_tools.model.retnet import load_model
from retnet_tools.weights import Array
from tests.exports import cpu_runner, export, run_prefill, run_steps, zero_states
from tests.helpers import BASE, random_source, random_tokens
from tests.tolerances import GRAPH_FLOAT32


class ToyOps(StandardOps):
    """silu(x) = x e^-softplus(-x), o_n = sum_k q_k S_kv."""

    name = "toy"
    activations: ClassVar[Mapping[Activation, Fragment]] = {
        **StandardOps.activations,
        "silu": lambda g, x: g.op("Mul", x, g.op("Exp", g.op("Neg", g.op("Softplus", g.op("Neg", x))))),
    }

    def retention_step(self, g: GraphBuilder, q: Value, k: Value, v: Value, past: Value, decay: StepDecay) -> Pair:
        """S_n = gamma S_(n-1) + k_n^T v_n, o_n = q_n S_n (Eq. 6)."""
        heads = len(decay.log_gamma)
        gamma = g.constant("gamma", np.exp(decay.log_gamma).astype(np.float32).reshape(1, heads, 1, 1))
        query, key, value = (g.reshape(x, 0, heads, -1) for x in (q, k, v))  # [B, 1, H*N] -> [B, H, N]
        outer = g.op("Einsum", key, value, equation="bhk,bhv->bhkv")
        present = g.op("Add", g.op("Mul", past, gamma), outer)
        output = g.op("Einsum", query, present, equation="bhk,bhkv->bhv")
        return g.reshape(output, 0, 1, -1), present


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(TARGET_DEVICES["cpu"].operators, "toy", ToyOps())
    monkeypatch.setattr(manifest, "OPERATORS", (*contract.OPERATORS, "toy"))
    return export(BASE, random_source(BASE, 3), tmp_path / "out", ops="toy")


def reference_runner(graph: Path) -> Callable[[dict[str, Array]], list[Array]]:
    evaluator = ReferenceEvaluator(str(graph))
    return lambda feeds: evaluator.run(None, feeds)


@pytest.mark.parametrize("runner", [cpu_runner, reference_runner])
def test_a_set_with_other_operators_computes_the_same_model(folder: Path, runner: Any) -> None:
    ids = random_tokens(BASE, 2, 9, seed=4)
    model = load_model(BASE, random_source(BASE, 3), torch.float64)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), form=retention_recurrent)
    step, prefill = runner(folder / contract.STEP_FILE), runner(folder / contract.PREFILL_FILE)
    logits, states = run_prefill(prefill, ids[:, :4], zero_states(BASE, 2))
    np.testing.assert_allclose(logits, expected.logits[:, 3].numpy(), rtol=0, atol=GRAPH_FLOAT32)
    for n, (logits, after) in enumerate(run_steps(step, ids[:, 4:], states, position=4), start=4):
        np.testing.assert_allclose(logits, expected.logits[:, n].numpy(), rtol=0, atol=GRAPH_FLOAT32)
    for state, reference in zip(after, expected.states, strict=True):
        np.testing.assert_allclose(state, reference.numpy(), rtol=0, atol=GRAPH_FLOAT32)


def test_the_graphs_consist_of_them(folder: Path) -> None:
    step, prefill = (onnx.load(folder / file, load_external_data=False) for file in ("step.onnx", "prefill.onnx"))
    assert {"Softplus", "Einsum"} < {node.op_type for node in step.graph.node}
    assert "Sigmoid" not in {node.op_type for model in (step, prefill) for node in model.graph.node}


def test_its_exports_are_read_back(folder: Path) -> None:
    assert read_manifest(folder).ops == "toy"
    assert plan_of_export(folder).ops == "toy"
