"""float16 states: no input overflows them, and on real text they are as good as float32 ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retnet_tools.formats import open_checkpoint
from retnet_tools.graph import contract
from retnet_tools.graph.contract import FLOAT16_STATE_LIMIT, state_scale
from retnet_tools.graph.export import plan_export, write_export
from retnet_tools.graph.ops import OPERATOR_SETS
from retnet_tools.paper import language_model_decay, paper_decay
from retnet_tools.runtime.session import DecoderSession
from retnet_tools.tokenizing.files import load_tokenizer
from tests.exports import checkpoint, cpu_runner, export, run_prefill, run_steps, zero_states
from tests.helpers import ABLATIONS, BASE, OTHER_LAYERS, random_source, random_tokens
from tests.tolerances import FLOAT16_STATE_KL, FLOAT16_STATES, GRAPH_FLOAT32

FIXTURE = Path(__file__).parents[2] / "fixtures" / "shakespeare"
OPS = list(OPERATOR_SETS)
LARGEST = 65504.0


def scales(config) -> np.ndarray:
    return np.array(state_scale(config, "float16"))[:, None, None]


@pytest.mark.parametrize("heads", [1, 4, 16, 32])
def test_the_papers_decays_are_scaled_by_one_less_gamma(heads: int) -> None:
    config = replace(BASE, num_heads=heads, key_dim=8 * heads, value_dim=8 * heads, decay=paper_decay(heads))
    expected = [max(2.0 ** (-5 - h), 2.0**-24) for h in range(heads)]
    assert list(state_scale(config, "float16")) == expected


@pytest.mark.parametrize("decay", [language_model_decay(4), (0.0,) * 4, (-1e-9, -0.3, -2.0, -80.0)])
def test_the_scaled_sum_of_powers_is_at_most_one(decay: tuple[float, ...]) -> None:
    for scale, log_gamma in zip(state_scale(replace(BASE, decay=decay), "float16"), decay, strict=True):
        assert np.log2(scale) == round(np.log2(scale))
        count = contract.MAX_POSITION + 1
        total = count if log_gamma == 0 else np.expm1(log_gamma * count) / np.expm1(log_gamma)
        assert 0.25 < scale * min(total, count) <= 1 + 1e-8 or log_gamma < -0.69


def test_the_slowest_key_dimension_decides(tmp_path: Path) -> None:
    config = replace(ABLATIONS["key_decay"], key_decay=(-0.2, -0.02, -0.003, -0.001))
    for scale, decay in zip(state_scale(config, "float16"), config.decay, strict=True):
        assert 0.5 < scale / -np.expm1(decay - 0.001) <= 1


def test_the_slowest_key_dimension_of_each_head_decides() -> None:
    slowest = (-0.001, -0.02, -0.003, -0.3)
    pairs = tuple(decay for own in slowest for decay in (-0.4, own, -0.7, -0.5))
    config = replace(ABLATIONS["head_rotation"], key_decay=pairs)
    for scale, decay, own in zip(state_scale(config, "float16"), config.decay, slowest, strict=True):
        assert 0.5 < scale / -np.expm1(decay + own) <= 1


def test_other_states_hold_the_plain_sum() -> None:
    assert state_scale(BASE, "float32") == (1.0,) * 4


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize(
    "name", ["base", "key_decay", "shared_key_value_heads", "feature_map_relu2", "stack", *OTHER_LAYERS]
)
def test_the_first_chunk_is_exact_and_leaves_the_scaled_sum(name: str, ops: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], 1)
    ids = random_tokens(config, 2, 40, 2)
    results = {}
    for dtype in ("float32", "float16"):
        folder = export(config, source, tmp_path / dtype, ops=ops, state_dtype=dtype)
        run = cpu_runner(folder / contract.PREFILL_FILE)
        results[dtype] = run_prefill(run, ids, zero_states(config, 2, dtype))
    np.testing.assert_allclose(results["float16"][0], results["float32"][0], rtol=0, atol=GRAPH_FLOAT32)
    for narrow, wide in zip(results["float16"][1], results["float32"][1], strict=True):
        assert narrow.dtype == np.float16
        np.testing.assert_allclose(narrow, wide * scales(config), rtol=2.0**-11, atol=1e-7)


GAMMAS = {
    "paper": paper_decay(4),
    "slow": tuple(float(np.log1p(-(2.0**-n))) for n in (9, 12, 16, 20)),
    "none": (0.0,) * 4,
}


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("gammas", GAMMAS)
def test_one_and_the_same_large_key_and_value_never_overflow(gammas: str, ops: str, tmp_path: Path) -> None:
    config = replace(BASE, decay=GAMMAS[gammas], rotary_frequencies=(0.0,) * 4)
    source = random_source(config, 3)
    for layer in range(2):
        for part in ("k_proj", "v_proj"):
            source.tensors[f"layers.{layer}.retention.{part}.weight"] *= 1e6
    folder = export(config, source, tmp_path / "out", ops=ops, state_dtype="float16")
    prefill, step = (cpu_runner(folder / name) for name in (contract.PREFILL_FILE, contract.STEP_FILE))
    ids = np.full((1, 1024), 7)
    states, position, seen = zero_states(config, 1, np.float16), 0, 0.0
    for _ in range(64):
        logits, states = run_prefill(prefill, ids, states, position=position)
        position += 1024
    for logits, after in run_steps(step, ids, states, position=position):
        seen = max(seen, *(float(np.abs(state.astype(np.float64)).max()) for state in after))
        assert np.isfinite(logits).all()
    assert 1 < seen <= FLOAT16_STATE_LIMIT**2
    if gammas == "paper":
        assert seen > 0.95 * FLOAT16_STATE_LIMIT**2


@pytest.mark.parametrize("ops", OPS)
def test_a_state_at_its_limit_stays_within_it(ops: str, tmp_path: Path) -> None:
    config = replace(BASE, decay=GAMMAS["slow"], rotary_frequencies=(0.0,) * 4)
    source = random_source(config, 4)
    for part in ("k_proj", "v_proj"):
        source.tensors[f"layers.0.retention.{part}.weight"] *= 1e6
    step = cpu_runner(export(config, source, tmp_path / "out", ops=ops, state_dtype="float16") / contract.STEP_FILE)
    (_, first), *_ = run_steps(step, np.full((1, 1), 7), zero_states(config, 1, np.float16))
    full = [np.sign(state) * np.float16(FLOAT16_STATE_LIMIT**2) for state in first]
    for _, states in run_steps(step, np.full((1, 200), 7), full, position=10_000_000):
        assert all(np.abs(state.astype(np.float64)).max() <= FLOAT16_STATE_LIMIT**2 for state in states)


@pytest.mark.parametrize("gammas", ["paper", "slow"])
def test_states_stay_near_float32_ones_step_by_step(gammas: str, tmp_path: Path) -> None:
    config, source = replace(BASE, decay=GAMMAS[gammas]), random_source(BASE, 5)
    ids, after = random_tokens(config, 1, 4096, 6), {}
    for dtype in ("float32", "float16"):
        step = cpu_runner(export(config, source, tmp_path / dtype, state_dtype=dtype) / contract.STEP_FILE)
        *_, (_, after[dtype]) = run_steps(step, ids, zero_states(config, 1, dtype))
    for narrow, wide in zip(after["float16"], after["float32"], strict=True):
        exact = wide.astype(np.float64) * scales(config)
        error = np.sqrt(((narrow - exact) ** 2).mean((0, 2, 3)) / (exact**2).mean((0, 2, 3)))
        assert (error < FLOAT16_STATES[gammas]).all()


def test_heads_that_float16_does_not_suit_are_named() -> None:
    config = replace(BASE, decay=GAMMAS["slow"])
    plan = plan_export(checkpoint(config, random_source(BASE, 5)), dtype="float32", ops="fused", state_dtype="float16")
    assert [note for note in plan.notes if "float16 states of heads 1, 2, 3" in note]
    plan = plan_export(checkpoint(BASE, random_source(BASE, 5)), dtype="float32", ops="fused", state_dtype="float16")
    assert plan.notes == ()


def log_probabilities(folder: Path, ids: np.ndarray) -> np.ndarray:
    session = DecoderSession(folder, threads=1)
    state = session.new_state(len(ids))
    logits = np.stack([session.step(column, state) for column in ids.T], 1).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_the_trained_fixture_hardly_notices(tmp_path: Path) -> None:
    text = (FIXTURE / "heldout.txt").read_text(encoding="utf-8")
    ids = np.array(load_tokenizer(FIXTURE / "tokenizer.json").encode(text).ids[: 8 * 512]).reshape(8, 512)
    found = {}
    for dtype in ("float32", "float16"):
        plan = plan_export(open_checkpoint(FIXTURE), dtype="float32", ops="fused", state_dtype=dtype)
        write_export(plan, tmp_path / dtype, force=False, progress=lambda count: None)
        found[dtype] = log_probabilities(tmp_path / dtype, ids)
    exact, narrow = found["float32"], found["float16"]
    divergence = (np.exp(exact) * (exact - narrow)).sum(-1).mean()
    assert 0 < divergence < FLOAT16_STATE_KL
    scale = json.loads((tmp_path / "float16" / contract.MANIFEST_FILE).read_text())["state_scale"]
    assert scale == [2.0**-5, 2.0**-6, 2.0**-7, 2.0**-8]
