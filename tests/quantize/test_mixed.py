"""Plans within a size: kept to the byte, filled by what saves most, near the best choice of all; written as rules that
say the same by hand, and refused with what can be."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retnet_tools.errors import UsageError
from retnet_tools.graph.code_types import matrix_bytes
from retnet_tools.graph.contract import WEIGHTS_FILE
from retnet_tools.graph.export import ExportPlan, plan_export
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.graph.quantization import Scheme, TensorRule
from retnet_tools.paper import paper_config
from retnet_tools.quantize import mixed
from retnet_tools.quantize.mixed import Choice, fill_room, plan_mixed
from retnet_tools.quantize.options import matrix_formats
from retnet_tools.quantize.plan import plan_blocks
from retnet_tools.quantize.steps import write_quantized
from retnet_tools.quantize.unfinished import Workplace
from retnet_tools.weights import canonical_shapes
from tests.exports import checkpoint
from tests.helpers import BASE, random_source, random_tokens
from tests.quantize.calibrated import as_text, quiet

SCHEME = Scheme("int4", 32)
# Large enough for the alignment of tensors in weights.data not to matter.
CONFIG = paper_config(vocab_size=200, hidden_size=96, value_dim=128, ffn_dim=160, num_layers=3, num_heads=4)


def float_plan(config=CONFIG, ops: str = "fused", dtype: str = "float32") -> ExportPlan:
    return plan_export(checkpoint(config, random_source(config, 3)), dtype=dtype, ops=ops)


def choose(work: Path, plan: ExportPlan | None = None, scheme: Scheme = SCHEME, **options) -> ExportPlan:
    plan = plan or float_plan()
    text = as_text(random_tokens(plan.checkpoint.config, 2, 40, 7))
    with Workplace(work) as place:
        return plan_mixed(plan, scheme, text, work=place, progress=quiet, **options)


def bits(plan: ExportPlan) -> float:
    """Bits a weight over all matrices."""
    shapes, formats = canonical_shapes(CONFIG), matrix_formats(plan.quantization.scheme, CONFIG)
    size = sum(matrix_bytes(shapes[name], format, 4) for name, format in formats.items())
    return 8 * size / sum(int(np.prod(shapes[name])) for name in formats)


@pytest.mark.parametrize("target", [6.0, 7.5, 12.0, 20.0])
def test_bits_are_kept_and_used(target: float, tmp_path: Path) -> None:
    found = bits(choose(tmp_path, target_bits=target))
    assert target - 1.0 < found <= target


@pytest.mark.parametrize("ops", ["fused", "standard"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_the_file_keeps_to_the_size(ops: str, part: float, tmp_path: Path) -> None:
    plan = float_plan(ops=ops)
    least = plan_blocks(plan, replace(SCHEME, accuracy_level=4 if ops == "fused" else None))
    size = int(least.weight_bytes + part * (plan.weight_bytes - least.weight_bytes))
    scheme = least.quantization.scheme
    chosen = choose(tmp_path / "work", plan, scheme, target_size=size)
    write_quantized(chosen, tmp_path / "out", force=False)
    written = (tmp_path / "out" / WEIGHTS_FILE).stat().st_size
    assert least.weight_bytes < written <= size


def test_a_byte_less_than_a_plan_takes_is_another_plan(tmp_path: Path) -> None:
    """Matrices that a graph no longer keeps as one are aligned one by one, which no choice of types counts."""
    plan = float_plan()
    least = plan_blocks(plan, replace(SCHEME, accuracy_level=4)).weight_bytes
    size = (least + plan.weight_bytes) // 2
    for _ in range(3):
        found = choose(tmp_path, plan, target_size=size).weight_bytes
        assert found <= size
        size = found - 1


def test_the_smallest_size_that_is_named_can_be_had(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--target-size 0\.00MB cannot be met; expected at least") as refusal:
        choose(tmp_path, target_size=1000)
    named = re.search(r"at least ([\d.]+)MB, which is int4 wherever the type is free", str(refusal.value))
    assert choose(tmp_path, target_size=round(float(named[1]) * 1e6)).quantization.scheme.exclude == ()
    with pytest.raises(UsageError, match="--target-bits 3 cannot be met; expected at least") as refusal:
        choose(tmp_path, target_bits=3.0)
    named = re.search(r"at least ([\d.]+), which", str(refusal.value))
    assert choose(tmp_path, target_bits=float(named[1])).quantization.scheme == SCHEME
    with pytest.raises(UsageError, match="cannot be met"):
        choose(tmp_path, target_bits=float(named[1]) - 0.002)


@pytest.mark.parametrize("target", [{"target_bits": 32.0}, {"target_size": 10**9}], ids=str)
def test_a_target_for_float_weights_is_refused(target: dict, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is enough for float weights \(.*\); expected less, or no target"):
        choose(tmp_path, **target)


def test_the_rules_given_by_hand_make_the_same_plan(tmp_path: Path) -> None:
    found = choose(tmp_path, target_bits=12.0)
    scheme = found.quantization.scheme
    assert scheme.tensor_types
    assert scheme.exclude
    by_hand = plan_blocks(float_plan(), scheme)
    names = [[name, tensor.dtype, tensor.shape, tensor.part] for name, tensor in by_hand.tensors.items()]
    assert names == [[name, tensor.dtype, tensor.shape, tensor.part] for name, tensor in found.tensors.items()]


def test_more_sensitive_matrices_get_more_bits(tmp_path: Path) -> None:
    source = random_source(CONFIG, 3)
    # Rows that differ by far, so that the small ones vanish in 4 bits; and a matrix that hardly matters.
    source.tensors["layers.1.ffn.down_proj.weight"][:, 0] *= 60
    source.tensors["layers.2.retention.out_proj.weight"] *= np.float32(1e-3)
    plan = plan_export(checkpoint(CONFIG, source), dtype="float32", ops="fused")
    formats = matrix_formats(choose(tmp_path, plan, target_bits=6.5).quantization.scheme, CONFIG)
    assert formats["layers.1.ffn.down_proj.weight"] is None or formats["layers.1.ffn.down_proj.weight"].bits == 8
    assert formats["layers.2.retention.out_proj.weight"].bits == 4


def test_rules_of_the_user_are_kept(tmp_path: Path) -> None:
    scheme = replace(
        SCHEME, exclude=("embedding",), tensor_types=(TensorRule("v_proj", "int4"), TensorRule("lm_head", "int8"))
    )
    found = choose(tmp_path, scheme=scheme, target_bits=15.0).quantization.scheme
    formats = matrix_formats(found, CONFIG)
    assert formats["embedding.weight"] is None
    assert formats["lm_head.weight"].bits == 8
    assert {formats[f"layers.{i}.retention.v_proj.weight"].bits for i in range(3)} == {4}
    with pytest.raises(UsageError, match="rules that name every matrix, and a budget"):
        choose(tmp_path, scheme=replace(SCHEME, tensor_types=(TensorRule("weight", "int8"),)), target_bits=15.0)


def test_int8_is_the_smallest_type_where_it_is_the_schemes(tmp_path: Path) -> None:
    found = choose(tmp_path, scheme=replace(SCHEME, type="int8"), target_bits=15.0).quantization.scheme
    assert {format.bits for format in matrix_formats(found, CONFIG).values() if format} == {8}
    assert found.exclude


def test_matrices_that_the_graph_keeps_as_one_get_one_type(tmp_path: Path) -> None:
    formats = matrix_formats(choose(tmp_path, together=True, target_bits=8.0).quantization.scheme, CONFIG)
    for i in range(3):
        for part, linears in (("retention", ("q", "k", "v", "gate")), ("ffn", ("gate", "up"))):
            assert len({formats[f"layers.{i}.{part}.{linear}_proj.weight"] for linear in linears}) == 1
    assert len(set(formats.values())) > 1


def test_what_was_predicted_is_noted_beside_what_was_measured(tmp_path: Path) -> None:
    plan = choose(tmp_path, target_bits=7.0)
    match = re.search(
        r"mean KL divergence (\S+) predicted, (\S+) measured \(rounded to nearest, 80 tokens of random\)",
        plan.notes[-1],
    )
    predicted, measured = map(float, match.groups())
    assert 0 < predicted < 3 * measured < 9 * predicted
    record, ids = plan.quantization.mixed_precision, random_tokens(CONFIG, 2, 40, 7)
    assert f"{record.predicted_kl:.2e}" == match[1]
    assert f"{record.measured_kl:.2e}" == match[2]
    assert (record.target_bits, record.target_size) == (7.0, None)
    assert record.text == replace(as_text(ids).record, ids_sha256=hashlib.sha256(ids.tobytes()).hexdigest())
    # Codes are rounded to nearest: nothing was learnt but the types.
    assert plan.quantization.calibration is None


def test_what_was_measured_is_recorded_and_explains_the_choice(tmp_path: Path) -> None:
    plan = choose(tmp_path / "work", target_bits=7.0)
    record, formats = plan.quantization.mixed_precision, matrix_formats(plan.quantization.scheme, CONFIG)
    found = {(names, entry.type): entry.mean_kl for entry in record.sensitivities for names in entry.matrices}
    assert set(found) == {(name, kind) for name in formats for kind in ("int4", "int8")}
    chosen = sum(found[name, f"int{format.bits}"] for name, format in formats.items() if format is not None)
    assert record.predicted_kl == pytest.approx(chosen)
    write_quantized(plan, tmp_path / "out", force=False)
    assert read_manifest(tmp_path / "out").quantization == plan.quantization
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    worst = max(found, key=found.__getitem__)
    assert "Types were chosen to keep to 7 bits a weight" in card
    assert f"| {worst[0]} | {worst[1]} | {found[worst]:.2e} |" in card


def test_int8_that_is_too_large_points_to_int4(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--target-bits 5 cannot be met; .*int8 wherever.*; --quantize int4, larger"):
        choose(tmp_path, scheme=replace(SCHEME, type="int8"), target_bits=5.0)


def test_a_calibrated_method_makes_the_codes_of_a_mixed_plan(tmp_path: Path) -> None:
    plan = choose(tmp_path / "work", scheme=replace(SCHEME, method="gptq"), target_bits=7.0)
    text = as_text(random_tokens(CONFIG, 2, 40, 7))
    manifest = write_quantized(plan, tmp_path / "out", force=False)
    assert manifest.quantization.scheme.method == "gptq"
    assert manifest.quantization.scheme.tensor_types
    assert manifest.quantization.calibration == text.record
    assert manifest.quantization.mixed_precision.text.tokens == 80


def test_patterns_fit_the_names_they_were_made_of_and_no_others() -> None:
    names = [name for name, shape in canonical_shapes(replace(BASE, num_layers=12)).items() if len(shape) == 2]
    chosen = names[::3]
    patterns = mixed._patterns(chosen)
    assert [name for name in names if any(re.search(pattern, name) for pattern in patterns)] == chosen
    assert len(patterns) < len(chosen)


def matrices(count: int, seed: int) -> list[list[Choice]]:
    draw = random.Random(seed)
    choices = []
    for _ in range(count):
        weight, cost = draw.randint(10, 100), 10 ** draw.uniform(-4, -1)
        choices.append(
            [Choice("int4", 5 * weight, cost), Choice("int8", 9 * weight, cost / 250), Choice(None, 32 * weight, 0.0)]
        )
    return choices


@given(count=st.integers(1, 6), seed=st.integers(0, 200), part=st.floats(0, 1))
def test_the_room_is_kept_and_what_fits_is_used(count: int, seed: int, part: float) -> None:
    choices = matrices(count, seed)
    least = sum(options[0].size for options in choices)
    most = sum(options[-1].size for options in choices)
    size = int(least + part * (most - least))
    chosen = fill_room(choices, size)
    used = sum(choice.size for choice in chosen)
    assert used <= size
    for choice, options in zip(chosen, choices, strict=True):
        assert choice in options
        # Nothing better fits any more.
        assert all(
            size - used < option.size - choice.size for option in options if option.divergence < choice.divergence
        )


def test_choices_come_near_the_best_of_all() -> None:
    lost = []
    for seed in range(60):
        choices = matrices(6, seed)
        sizes = [sum(options[k].size for options in choices) for k in (0, 1)]
        size = (sizes[0] + sizes[1]) // 2
        best = min(
            sum(choice.divergence for choice in combination)
            for combination in itertools.product(*choices)
            if sum(choice.size for choice in combination) <= size
        )
        lost.append(sum(choice.divergence for choice in fill_room(choices, size)) / best)
    assert sorted(lost)[len(lost) // 2] < 1.05
    assert max(lost) < 3


def test_what_saves_nothing_is_not_bought() -> None:
    worse = [Choice("int4", 10, 1e-3), Choice("int8", 20, 2e-3), Choice(None, 80, 0.0)]
    assert fill_room([worse], 50) == [worse[0]]
    assert fill_room([worse], 80) == [worse[2]]


@pytest.mark.parametrize("divergence", [math.nan, math.inf])
def test_a_divergence_that_is_no_number_is_no_choice(divergence: float) -> None:
    with pytest.raises(ValueError, match="a divergence of"):
        Choice("int4", 10, divergence)
