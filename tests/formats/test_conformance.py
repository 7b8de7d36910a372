"""Checkpoints that the implementations wrote themselves, against the outputs of their own code.

torchscale's have more to say and a file of their own. What a model runs with is what its code rounds to float32:
syncdoth and yet-another-retnet store it, flash-linear-attention computes it again (see `schedules`), and so do the
float64 golden outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from retnet_tools.config import RetNetConfig
from retnet_tools.formats import open_checkpoint
from retnet_tools.graph.contract import STEP_FILE
from retnet_tools.model.retention import FORMS, retention_chunkwise
from retnet_tools.model.retnet import RetNetOutput, load_model
from retnet_tools.weights import Array
from tests import tolerances
from tests.exports import cpu_runner, export, run_steps, zero_states
from tests.formats.cases import CONFORMANCE, golden

CASES = {
    "fla_base/hf_bin": "flash-linear-attention",
    "fla_base/hf_safetensors": "flash-linear-attention",
    "fla_base/hf_bin/pytorch_model.bin": "flash-linear-attention",
    "fla_mqa_noaffine/hf_safetensors": "flash-linear-attention",
    "sd_base_gelu/hf_bin": "syncdoth/RetNet",
    "sd_base_gelu/hf_safetensors": "syncdoth/RetNet",
    "sd_deepnorm/hf_safetensors": "syncdoth/RetNet",
    "sd_lmdecay_tied/hf_bin": "syncdoth/RetNet",
    "sd_lmdecay_tied/hf_safetensors": "syncdoth/RetNet",
    "yar_base": "yet-another-retnet",
    "yar_base/model.pt": "yet-another-retnet",
    "js_base": "Jamie-Stirling",
    "js_base/model.pt": "Jamie-Stirling",
}
EXPORTED = (
    "fla_mqa_noaffine/hf_safetensors",
    "sd_deepnorm/hf_safetensors",
    "yar_base",
    "js_base",
    "xatl_410m/hf_bin",
    "xatl_parallel_residual/hf_converted",
    "syncdoth_2023_wac81/hf_bin",
    "dragn_rmsnorm/hf_ckpt_0",
    "flame_dcp/seed_step-0",
)
each_case = pytest.mark.parametrize("case", CASES)
each_form = pytest.mark.parametrize("form", ["parallel", "recurrent"])


def arrays(case: str) -> dict[str, Array]:
    """The golden arrays of a case, a stack's under the names of a language model."""
    found = golden(CONFORMANCE / case.split("/")[0] / "case.json")
    return {name.replace("input_embeds", "input_ids").replace("output_", "logits_"): a for name, a in found.items()}


def run(case: str, form: str, dtype: torch.dtype, name: str = "input_ids", position: int = 0) -> RetNetOutput:
    checkpoint = open_checkpoint(CONFORMANCE / case)
    forms = {**FORMS, "chunkwise": partial(retention_chunkwise, chunk_size=8)}
    with torch.no_grad():
        model = load_model(checkpoint.config, checkpoint.weights, dtype)
        return model(torch.from_numpy(arrays(case)[name]), form=forms[form], keep_hidden=True, position=position)


def largest(output: torch.Tensor, expected: Array) -> float:
    return float(np.abs(output.numpy() - expected).max())


@each_case
@each_form
def test_float64_logits_are_those_of_the_implementation(case: str, form: str) -> None:
    output = run(case, form, torch.float64)
    assert largest(output.logits, arrays(case)[f"logits_{form}_f64"]) <= tolerances.GOLDEN_FLOAT64


@each_case
@each_form
def test_float32_logits_and_hidden_states_are_those_of_the_implementation(case: str, form: str) -> None:
    output, expected = run(case, form, torch.float32), arrays(case)
    assert largest(output.logits, expected[f"logits_{form}"]) <= tolerances.GOLDEN_FLOAT32
    # Hugging Face gives the final norm's output as the last hidden state; the last layer's is not among them.
    for i, hidden in enumerate(output.hidden_states[:-1]):
        assert largest(hidden, expected[f"hidden_{i}"]) <= tolerances.GOLDEN_FLOAT32


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("fla", "yar"))])
def test_float32_chunkwise_logits_are_those_of_the_implementation(case: str) -> None:
    output = run(case, "chunkwise", torch.float32)
    assert largest(output.logits, arrays(case)["logits_chunkwise"]) <= tolerances.GOLDEN_FLOAT32


def test_longer_inputs_are_those_of_the_implementations() -> None:
    output = run("fla_base/hf_bin", "chunkwise", torch.float32, "input_ids_len80")
    assert largest(output.logits, arrays("fla_base")["logits_len80_chunk"]) <= tolerances.GOLDEN_FLOAT32
    output = run("js_base", "chunkwise", torch.float32, "input_ids_len40")
    assert largest(output.logits, arrays("js_base")["logits_chunkwise_len40"]) <= tolerances.GOLDEN_FLOAT32


def _scaled_queries(config: RetNetConfig, arrays: dict[str, Array], i: int) -> Array:
    halves = arrays[f"state_recurrent_L{i}"] * config.score_normalization.key_scale
    return np.stack(np.split(halves, 2, axis=2), axis=3).reshape(halves.shape)  # [B, H, K, V], rows into pairs


def _divided_by_root_of_sum(config: RetNetConfig, arrays: dict[str, Array], i: int) -> Array:
    # [B, H, V, K] -> [B, H, K, V]
    return (arrays[f"state_recurrent_L{i}"] * np.sqrt(arrays[f"state_scale_L{i}"])).swapaxes(-1, -2)


def _plain(config: RetNetConfig, arrays: dict[str, Array], i: int) -> Array:
    return arrays[f"state_recurrent_L{i}"]


def _over_xpos(config: RetNetConfig, arrays: dict[str, Array], i: int) -> Array:
    grown = np.exp(np.repeat(config.key_decay, 2) * arrays["input_ids"].shape[1])
    return arrays[f"state_recurrent_L{i}"] * grown[:, None]


STATES: dict[str, Callable[[RetNetConfig, dict[str, Array], int], Array]] = {
    "fla": _scaled_queries,
    "sd": _divided_by_root_of_sum,
    "yar": _plain,
    "js": _over_xpos,
}


@each_case
def test_states_are_those_of_the_implementation_in_our_scale(case: str) -> None:
    config, expected = open_checkpoint(CONFORMANCE / case).config, arrays(case)
    first = 1 if case.startswith("js") else 0  # where its recurrent form places the first token
    for i, state in enumerate(run(case, "recurrent", torch.float32, position=first).states):
        theirs = STATES[case.split("_")[0]](config, expected, i)
        assert largest(state, theirs) <= tolerances.GOLDEN_STATES * np.abs(theirs).max()


@each_case
def test_a_checkpoint_tells_its_format_and_its_files(case: str) -> None:
    checkpoint = open_checkpoint(CONFORMANCE / case)
    assert checkpoint.format == CASES[case]
    names = {file.name for file in checkpoint.source_files}
    assert names <= {"config.json", "args.json", "model.safetensors", "pytorch_model.bin", "model.pt"}
    assert len(names) == 2
    assert checkpoint.assumed_clamp == case.startswith("sd")
    assert all("which clamp" in note for note in checkpoint.notes)


@pytest.mark.parametrize("ops", ["fused", "standard"])
@pytest.mark.parametrize("case", EXPORTED)
def test_the_exported_step_graph_gives_the_logits_of_the_implementation(case: str, ops: str, tmp_path: Path) -> None:
    checkpoint, expected = open_checkpoint(CONFORMANCE / case), arrays(case)
    config = checkpoint.config
    runner = cpu_runner(export(config, checkpoint.weights, tmp_path / "out", ops=ops) / STEP_FILE)
    for n, (logits, _) in enumerate(run_steps(runner, expected["input_ids"], zero_states(config, 2))):
        np.testing.assert_allclose(logits, expected["logits_recurrent"][:, n], rtol=0, atol=tolerances.GOLDEN_FLOAT32)
