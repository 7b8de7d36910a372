"""Sensitivities against whole models loaded with one matrix changed, and their record on disk."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from retnet_tools.distributions import mean_kl
from retnet_tools.errors import InputError
from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.model.retention import retention_chunkwise
from retnet_tools.model.retnet import load_model
from retnet_tools.quantize import sensitivity
from retnet_tools.quantize.blockwise import quantize_rows
from retnet_tools.quantize.sensitivity import Sensitivity, Trial
from retnet_tools.weights import canonical_shapes
from tests.helpers import ABLATIONS, BASE, OTHER_LAYERS, random_source, random_tokens
from tests.quantize.calibrated import make_task
from tests.quantize.test_blockwise import decode

INT4, INT8 = BlockFormat(4, 32, True), BlockFormat(8, 64, False)


def divergence(config, names: dict[str, BlockFormat], ids: np.ndarray, dtype=np.float32) -> float:
    """Of a whole model with these matrices rounded to nearest, from a whole float one."""
    logits = []
    for formats in ({}, names):
        source = random_source(config, 3)
        for name, tensor in source.tensors.items():
            source.tensors[name] = tensor.astype(dtype).astype(np.float32)
        for name, format in formats.items():
            rows = quantize_rows(source.tensors[name], format, np.dtype(dtype))
            source.tensors[name] = decode(rows, format).astype(np.float32)
        with torch.inference_mode():
            model = load_model(config, source, torch.float32)
            logits.append(model(torch.from_numpy(ids), form=retention_chunkwise).logits.numpy())
    return mean_kl(*logits)


@pytest.mark.parametrize(
    "name", ["base", "tied", "torchscale_2023", "branch_norm_without_final", "post_norm", *OTHER_LAYERS]
)
def test_each_is_the_divergence_of_the_whole_model(name: str, tmp_path: Path) -> None:
    config, ids = ABLATIONS[name], random_tokens(ABLATIONS[name], 3, 40, 7)
    matrices = [matrix for matrix, shape in canonical_shapes(config).items() if len(shape) == 2]
    trials = [Trial((matrix,), format) for matrix in matrices for format in (INT4, INT8)]
    found = Sensitivity(make_task(config, random_source(config, 3), tmp_path), trials).measure()
    assert list(found) == trials
    for trial in trials:
        expected = divergence(config, {trial.names[0]: trial.format}, ids)
        assert found[trial] == pytest.approx(expected, rel=0.02, abs=1e-9)
        assert expected > 1e-8


def test_types_of_one_matrix_are_measured_apart(tmp_path: Path) -> None:
    trials = [Trial(("lm_head.weight",), format) for format in (INT4, INT8)]
    found = Sensitivity(make_task(BASE, random_source(BASE, 3), tmp_path), trials).measure()
    assert 0 < found[trials[1]] < found[trials[0]] / 50


def test_several_matrices_together_and_all_of_them(tmp_path: Path) -> None:
    ids = random_tokens(BASE, 3, 40, 7)
    together = ("layers.1.ffn.gate_proj.weight", "layers.1.ffn.up_proj.weight")
    measured = Sensitivity(make_task(BASE, random_source(BASE, 3), tmp_path), [Trial(together, INT4)])
    expected = divergence(BASE, dict.fromkeys(together, INT4), ids)
    assert measured.measure()[Trial(together, INT4)] == pytest.approx(expected, rel=1e-3)
    everything = {matrix: INT4 for matrix, shape in canonical_shapes(BASE).items() if len(shape) == 2}
    assert measured.total(everything) == pytest.approx(divergence(BASE, everything, ids), rel=1e-3)


def test_weights_have_the_type_of_the_export(tmp_path: Path) -> None:
    trial, ids = Trial(("lm_head.weight",), INT4), random_tokens(BASE, 3, 40, 7)
    found = Sensitivity(make_task(BASE, random_source(BASE, 3), tmp_path, dtype="float16"), [trial]).measure()
    assert found[trial] == pytest.approx(divergence(BASE, {trial.names[0]: INT4}, ids, np.float16), rel=1e-3)


def test_some_sequences_from_all_over_the_text_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "TOKENS", 80)
    trial, ids = Trial(("lm_head.weight",), INT4), random_tokens(BASE, 7, 40, 7)
    task = make_task(BASE, random_source(BASE, 3), tmp_path, sequences=ids)
    measured, chosen = Sensitivity(task, [trial]), ids[[0, 3]]
    assert measured.text.tokens == 80
    assert measured.text.ids_sha256 == hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest()
    assert measured.measure()[trial] == pytest.approx(divergence(BASE, {trial.names[0]: INT4}, chosen), rel=1e-3)


def test_few_logits_at_a_time_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial, source = Trial(("lm_head.weight",), INT4), random_source(BASE, 3)
    whole = Sensitivity(make_task(BASE, source, tmp_path / "a"), [trial]).measure()[trial]
    monkeypatch.setattr(sensitivity, "_LOGITS", 7 * BASE.vocab_size + 1)
    rows: list[int] = []
    logits = sensitivity.Head.logits
    monkeypatch.setattr(sensitivity.Head, "logits", lambda head, x: rows.append(x.shape[1]) or logits(head, x))
    found = Sensitivity(make_task(BASE, source, tmp_path / "b"), [trial]).measure()[trial]
    assert found == pytest.approx(whole, rel=1e-6)
    assert max(rows) == 7
    assert sum(rows) == 2 * 120


def test_the_float_head_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = sensitivity.FloatWeights.read
    monkeypatch.setattr(
        sensitivity.FloatWeights, "read", lambda weights, name: read.append(name) or original(weights, name)
    )
    trials = [Trial((f"layers.{i}.retention.{part}_proj.weight",), INT4) for i in (0, 1) for part in "qkv"]
    Sensitivity(make_task(BASE, random_source(BASE, 3), tmp_path), trials).measure()
    assert read.count("lm_head.weight") == 1


def test_logits_that_are_not_finite_are_refused_and_nothing_is_kept(tmp_path: Path) -> None:
    config = ABLATIONS["no_head_norm"]
    source = random_source(config, 3)
    source.tensors["layers.0.retention.v_proj.weight"] *= np.float32(1e38)
    trial = Trial(("layers.1.ffn.up_proj.weight",), INT4)
    with (
        np.errstate(all="ignore"),
        pytest.raises(InputError, match=r"gives lm_head.weight inputs or logits that are not finite in float32"),
    ):
        Sensitivity(make_task(config, source, tmp_path), [trial]).measure()
    assert not list(tmp_path.glob("sensitivity-*"))


def test_weights_that_are_not_finite_are_refused_before_anything_is_kept(tmp_path: Path) -> None:
    source = random_source(BASE, 3)
    source.tensors["layers.1.ffn.up_proj.weight"][0, 0] = np.nan
    with pytest.raises(InputError, match="holds 1 NaN"):
        Sensitivity(make_task(BASE, source, tmp_path), [Trial(("lm_head.weight",), INT4)])
    assert list(tmp_path.iterdir()) == []


class Stopped(Exception):
    pass


def test_a_stopped_run_goes_on_after_the_last_result(tmp_path: Path) -> None:
    names = ["embedding.weight", "layers.0.ffn.up_proj.weight", "layers.1.retention.q_proj.weight", "lm_head.weight"]
    trials, steps = [Trial((name,), INT4) for name in names], []

    def until(what: str, done: int, total: int) -> None:
        if done == 2:
            raise Stopped

    task = make_task(BASE, random_source(BASE, 3), tmp_path / "work", progress=until)
    with pytest.raises(Stopped):
        Sensitivity(task, trials).measure()
    again = replace(task, progress=lambda what, done, total: steps.append((what, done, total)))
    found = Sensitivity(again, trials).measure()
    assert steps == [("reading weights", 0, 5), (names[2], 2, 5), (names[3], 3, 5)]
    assert found == Sensitivity(make_task(BASE, random_source(BASE, 3), tmp_path / "whole"), trials).measure()


def test_other_trials_begin_anew(tmp_path: Path) -> None:
    task = make_task(BASE, random_source(BASE, 3), tmp_path)
    first = Sensitivity(task, [Trial(("lm_head.weight",), INT4)]).measure()
    second = Sensitivity(task, [Trial(("lm_head.weight",), replace(INT4, symmetric=False))]).measure()
    assert list(first.values()) != list(second.values())
