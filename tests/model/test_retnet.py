from dataclasses import replace
from functools import partial
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch

from retnet_tools.config import BlockNorm
from retnet_tools.errors import InputError
from retnet_tools.model.norms import Norm, normalize
from retnet_tools.model.retention import FORMS, retention_chunkwise, retention_recurrent
from retnet_tools.model.retnet import RetNet, initialize, load_model
from retnet_tools.weights import canonical_shapes
from tests.helpers import ABLATIONS, BASE, MemorySource, random_source, random_tokens
from tests.reference import reference_logits
from tests.tolerances import BFLOAT16_STATE, LOGITS_FLOAT32, LOGITS_FLOAT64

CHUNKED = {**FORMS, "chunkwise": partial(retention_chunkwise, chunk_size=5)}
LENGTH = 24
each_config = pytest.mark.parametrize("config", ABLATIONS.values(), ids=ABLATIONS)


def run(config, source, ids, dtype=torch.float64, **options):
    with torch.inference_mode():
        return load_model(config, source, dtype)(torch.from_numpy(ids), **options)


def all_forms(config, source, ids, dtype):
    return {name: run(config, source, ids, dtype, form=form).logits.double() for name, form in CHUNKED.items()}


def spread(logits):
    return max((a - b).abs().max().item() for a in logits.values() for b in logits.values())


@each_config
def test_the_recurrent_form_equals_a_token_by_token_network_in_numpy(config):
    source, ids = random_source(config, seed=3), random_tokens(config, 2, LENGTH, seed=4)
    logits = run(config, source, ids, form=retention_recurrent).logits.numpy()
    np.testing.assert_allclose(logits, reference_logits(config, source, ids), atol=LOGITS_FLOAT64, rtol=0)
    assert 1 < np.abs(logits).max() < 20


@each_config
def test_the_forms_agree_in_float64_without_head_norm_epsilon(config):
    source, ids = random_source(config, seed=5), random_tokens(config, 2, LENGTH, seed=6)
    assert spread(all_forms(config.with_head_norm_eps(0.0), source, ids, torch.float64)) < LOGITS_FLOAT64


@each_config
def test_the_forms_agree_in_float32_beyond_what_the_epsilons_explain(config):
    source, ids = random_source(config, seed=7), random_tokens(config, 2, LENGTH, seed=8)
    explained = spread(all_forms(config, source, ids, torch.float64))
    assert spread(all_forms(config, source, ids, torch.float32)) - explained < LOGITS_FLOAT32


@each_config
@pytest.mark.parametrize("form", CHUNKED.values(), ids=CHUNKED)
def test_a_prefix_then_single_steps_equals_one_run(config, form):
    config = config.with_head_norm_eps(0.0)
    source, ids = random_source(config, seed=9), torch.from_numpy(random_tokens(config, 2, 9, seed=10))
    model = load_model(config, source, torch.float64)
    with torch.inference_mode():
        whole = model(ids, form=form).logits
        output = model(ids[:, :5], form=form)
        pieces = [output.logits]
        for n in range(5, 9):
            output = model(ids[:, n : n + 1], form=retention_recurrent, states=output.states, position=n)
            pieces.append(output.logits)
    np.testing.assert_allclose(torch.cat(pieces, 1), whole, atol=LOGITS_FLOAT64, rtol=0)


def test_rows_may_stand_at_different_positions():
    ids = random_tokens(BASE, 2, 6, seed=1)
    model = load_model(BASE, random_source(BASE, seed=1), torch.float64)
    together = model(torch.from_numpy(ids), position=torch.tensor([3, 50])).logits
    for row, position in enumerate((3, 50)):
        alone = model(torch.from_numpy(ids[row : row + 1]), position=position).logits
        torch.testing.assert_close(together[row : row + 1], alone, atol=LOGITS_FLOAT64, rtol=0)


def test_hidden_states_are_kept_when_asked_for():
    ids = random_tokens(BASE, 2, 6, seed=1)
    source = random_source(BASE, seed=1)
    kept = run(BASE, source, ids, keep_hidden=True).hidden_states
    assert len(kept) == BASE.num_layers + 1
    assert torch.equal(kept[0], torch.from_numpy(source.read("embedding.weight")).double()[ids])
    assert all(not torch.equal(a, b) for a, b in pairwise(kept))
    assert run(BASE, source, ids).hidden_states == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_keep_phases_decay_and_states_in_float32(dtype):
    output = run(BASE, random_source(BASE, 1), random_tokens(BASE, 1, 8, seed=1), dtype)
    assert output.logits.dtype == dtype
    assert all(state.dtype == torch.float32 for state in output.states)


@pytest.mark.parametrize("form", [FORMS["parallel"], retention_recurrent, FORMS["chunkwise"]], ids=list(FORMS))
def test_a_long_memory_decays_in_bfloat16(form):
    config = replace(BASE, num_layers=1, decay=(float(np.log1p(-(2.0**-10))),) * 4)
    source = random_source(config, seed=11, dtype=ml_dtypes.bfloat16)
    ids = np.full((1, 1000), 7)
    exact = run(replace(config, rotary_frequencies=(0.0,) * 4), source, ids, torch.float32, form=form).states[0]
    half = run(replace(config, rotary_frequencies=(0.0,) * 4), source, ids, torch.bfloat16, form=form).states[0]
    undecayed = run(replace(config, rotary_frequencies=(0.0,) * 4, decay=(0.0,) * 4), source, ids, torch.float32)
    assert (half - exact).norm() / exact.norm() < BFLOAT16_STATE
    assert (undecayed.states[0] - exact).norm() / exact.norm() > 10 * BFLOAT16_STATE


@each_config
def test_parameters_have_the_canonical_names_and_shapes(config):
    parameters = {name: tuple(p.shape) for name, p in RetNet(config).named_parameters()}
    assert parameters == canonical_shapes(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("final_norm.weight"), "no tensor 'final_norm.weight'"),
        (lambda t: t.update({"layers.2.ffn_norm.weight": np.ones(32)}), "unknown tensor 'layers.2.ffn_norm.weight'"),
        (lambda t: t.update({"lm_head.weight": np.ones((60, 32))}), r"'lm_head.weight' has shape \[60, 32\]"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_weights_that_do_not_fit_are_refused_by_name(change, message):
    tensors = dict(random_source(BASE, 1).tensors)
    change(tensors)
    with pytest.raises(InputError, match=message):
        load_model(BASE, MemorySource(tensors), torch.float32)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_weights_of_every_float_type_load_exactly(dtype):
    source = random_source(BASE, 1, dtype)
    loaded = load_model(BASE, source, torch.float64).state_dict()
    for name in source.names():
        np.testing.assert_array_equal(loaded[name].numpy(), source.read(name).astype(np.float64))


def test_initialization_depends_on_the_seed_alone():
    first, again, other = (initialize(RetNet(BASE), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_squares_of_a_norm_do_not_overflow_float16(kind):
    x = np.random.default_rng(3).standard_normal((2, 64)) * 1e3
    norm = Norm(64, BlockNorm(kind, 1e-6)).to(torch.float16)
    centred = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True))
    np.testing.assert_allclose(norm(torch.from_numpy(x).half()).detach(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["rms", "layer", "none"])
def test_a_zero_vector_stays_zero_without_epsilon(kind):
    assert torch.equal(normalize(torch.zeros(2, 4), kind, 0.0), torch.zeros(2, 4))


def test_the_initial_distribution_is_that_of_torchscale():
    """xavier_uniform_ with gain 2^-2.5 for q, k, v and the gate, and 1 for the output (`reset_parameters` of its
    multiscale_retention.py)."""
    small = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "retention.gate_proj.weight")
    for name, parameter in initialize(RetNet(BASE), 1).named_parameters():
        if name.endswith((*small, "out_proj.weight")):
            gain = 2**-2.5 if name.endswith(small) else 1
            bound = gain * (6 / sum(parameter.shape)) ** 0.5
            assert 0.95 * bound < parameter.abs().max() <= bound
        elif name.endswith("embedding.weight"):
            assert abs(float(parameter.detach().std()) * BASE.hidden_size**0.5 - 1) < 0.1
