"""Quantized folders: whole or not there, the same by either way, every tensor once."""

from __future__ import annotations

import errno
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from retnet_tools.errors import InputError, OutputError, UsageError
from retnet_tools.graph import contract
from retnet_tools.graph.export import plan_export, write_export
from retnet_tools.graph.exported import plan_of_export
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.graph.quantization import Calibration, Quality, Scheme
from retnet_tools.graph.reader import read_graphs
from retnet_tools.graph.stored import StoredTensor, stored_bytes
from retnet_tools.quantize import methods
from retnet_tools.quantize.blockwise import QuantizedRows
from retnet_tools.quantize.card import update_record
from retnet_tools.quantize.methods import CalibrationText, MethodSpec, RoundToNearest
from retnet_tools.quantize.plan import plan_half, plan_quantization, plan_target, write_quantized
from retnet_tools.quantize.scheme import SchemeOptions, make_scheme
from retnet_tools.runtime.session import DecoderSession
from tests.exports import checkpoint, export
from tests.helpers import ABLATIONS, BASE, MemorySource, random_source, random_tokens
from tests.quantized import quantize
from tests.tolerances import GRAPH_FLOAT32


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def places(folder: Path, name: str = contract.STEP_FILE) -> dict[str, tuple[int, int]]:
    """Offset and length of each external tensor of a graph."""
    found = {}
    for tensor in onnx.load(folder / name, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            found[tensor.name] = (int(place["offset"]), int(place["length"]))
    return found


@pytest.mark.parametrize("target", ["onnx", "genai"])
@pytest.mark.parametrize("ops", ["fused", "standard"])
@pytest.mark.parametrize("name", ["base", "tied", "torchscale_2023"])
def test_an_export_is_planned_and_written_again_bit_for_bit(name: str, ops: str, target: str, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    folder = export(config, random_source(config, 1), tmp_path / "float", ops=ops, target=target)
    write_export(plan_of_export(folder), tmp_path / "again", force=False, progress=lambda count: None)
    assert contents(tmp_path / "again") == contents(folder)


@pytest.mark.parametrize("target", ["onnx", "genai"])
@pytest.mark.parametrize("ops", ["fused", "standard"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("stored", [np.float16, np.float32, np.float64])
def test_quantizing_at_export_equals_quantizing_the_export(
    stored: type, dtype: str, ops: str, target: str, tmp_path: Path
) -> None:
    config, source = ABLATIONS["tied"], random_source(ABLATIONS["tied"], 2, dtype=stored)
    plan = plan_export(checkpoint(config, source), dtype=dtype, ops=ops, target=target)
    options = SchemeOptions(exclude=("layers.0.*k_proj",), tensor_types=("v_proj=int8",))
    at_once = plan_quantization(plan, make_scheme("int4", options, ops=ops))
    write_quantized(at_once, tmp_path / "at_once", force=False, progress=lambda count: None)
    write_export(plan, tmp_path / "float", force=False, progress=lambda count: None)
    later = plan_quantization(plan_of_export(tmp_path / "float"), make_scheme("int4", options, ops=ops))
    write_quantized(later, tmp_path / "later", force=False, progress=lambda count: None)
    assert contents(tmp_path / "later") == contents(tmp_path / "at_once")


@pytest.mark.parametrize("target", ["onnx", "genai"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("ops", ["fused", "standard"])
def test_half_precision_equals_an_export_in_it(ops: str, dtype: str, target: str, tmp_path: Path) -> None:
    source = random_source(BASE, 3)
    folder = export(BASE, source, tmp_path / "float", ops=ops, target=target)
    plan = plan_half(plan_of_export(folder), dtype)
    write_quantized(plan, tmp_path / "half", force=False, progress=lambda count: None)
    expected = export(BASE, source, tmp_path / "expected", ops=ops, dtype=dtype, target=target)
    assert contents(tmp_path / "half") == contents(expected)


def test_the_record_reads_back_and_counts_the_bytes(tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 4), tmp_path / "float")
    out = quantize(folder, tmp_path / "out", "int4", block_size=32)
    before, after = read_manifest(folder), read_manifest(out)
    assert before.quantization is None
    assert after.quantization.scheme == Scheme("int4", 32)
    assert after.quantization.float_bytes == sum(length for _, length in places(folder).values())
    assert after.quantization.weight_bytes == sum(length for _, length in places(out).values())
    assert replace(after, quantization=None) == before


@pytest.mark.parametrize("change", [{"type": "int3"}, {"group": 1}, {"accuracy_level": 3}])
def test_a_manifest_with_an_unknown_scheme_is_refused(change: dict, tmp_path: Path) -> None:
    out = quantize(export(BASE, random_source(BASE, 4), tmp_path / "float"), tmp_path / "out", "int8")
    manifest = json.loads((out / contract.MANIFEST_FILE).read_text())
    manifest["quantization"]["scheme"].update(change)
    (out / contract.MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=next(iter(change))):
        read_manifest(out)


def test_the_card_says_what_was_done(tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 4), tmp_path / "float")
    out = quantize(folder, tmp_path / "out", "int4", exclude=("lm_head|k_proj",), symmetric=False)
    card, record = (out / "README.md").read_text(), read_manifest(out).quantization
    assert "int4 in blocks of 64, asymmetric, rtn, accuracy level 4, float where lm_head\\|k_proj" in card
    assert "| matrices | 15 int4, 3 float32 |" in card
    assert f"{record.weight_bytes / record.float_bytes:.1%}" in card
    assert "Quality" not in card


def test_figures_measured_later_go_into_manifest_and_card(tmp_path: Path) -> None:
    out = quantize(export(BASE, random_source(BASE, 4), tmp_path / "float"), tmp_path / "out", "int4")
    record = read_manifest(out).quantization
    record = replace(
        record,
        calibration=Calibration("plays.txt", "ab" * 32, 4096),
        quality=Quality("held.txt", "cd" * 32, 512, 12.5, 12.25, 0.03, 0.875),
    )
    update_record(out, record)
    assert read_manifest(out).quantization == record
    card = (out / "README.md").read_text()
    assert "4096 tokens of `plays.txt`" in card
    assert "| perplexity | 12.5000 | 12.2500 |" in card
    assert "87.50%" in card
    assert DecoderSession(out, threads=1).manifest.quantization == record


@pytest.mark.parametrize("ops", ["fused", "standard"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_tied_embedding_is_stored_once(ops: str, kind: str, symmetric: bool, tmp_path: Path) -> None:
    config = ABLATIONS["tied"]
    folder = export(config, random_source(config, 5), tmp_path / "float", ops=ops)
    out = quantize(folder, tmp_path / "out", kind, symmetric=symmetric)
    for graph in (contract.STEP_FILE, contract.PREFILL_FILE):
        found = places(out, graph)
        views = {name: place for name, place in found.items() if name.endswith(".view")}
        assert all(found[name.removesuffix(".view")] == place for name, place in views.items())
        assert views
        others = sorted(set(found.values()))
        assert all(start + length <= after for (start, length), (after, _) in itertools.pairwise(others))
    assert places(out, contract.STEP_FILE) == places(out, contract.PREFILL_FILE)
    listed = read_graphs(out, [contract.STEP_FILE]).tensors
    assert sum(listed.info(name).nbytes for name in listed.names()) == read_manifest(out).quantization.weight_bytes


def test_what_is_no_matrix_stays_as_it_was(tmp_path: Path) -> None:
    config = ABLATIONS["torchscale_2023"]
    folder = export(config, random_source(config, 6), tmp_path / "float")
    out = quantize(folder, tmp_path / "out", "int8")
    before, after = (read_graphs(path, [contract.STEP_FILE]).tensors for path in (folder, out))
    kept = [name for name in before.names() if before.info(name).shape[1:] == () or name.startswith("positions.")]
    assert len(kept) > 20
    for name in kept:
        np.testing.assert_array_equal(before.read(name), after.read(name))


def test_a_quantized_folder_runs_in_a_session(tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 7), tmp_path / "float")
    session = DecoderSession(quantize(folder, tmp_path / "out", "int8", accuracy_level=0), threads=1)
    ids = random_tokens(BASE, 2, 9, 8)
    state, stepped = session.new_state(2), session.new_state(2)
    prefilled = session.prefill(ids, state)
    for column in ids.T:
        logits = session.step(column, stepped)
    np.testing.assert_allclose(prefilled, logits, rtol=0, atol=GRAPH_FLOAT32)


def test_the_plan_that_is_quantized_stays_as_it_was(tmp_path: Path) -> None:
    plan = plan_export(checkpoint(BASE, random_source(BASE, 9)), dtype="float32", ops="fused")
    expected = export(BASE, random_source(BASE, 9), tmp_path / "expected")
    plan_quantization(plan, Scheme("int4", 64))
    write_export(plan, tmp_path / "out", force=False, progress=lambda count: None)
    assert contents(tmp_path / "out") == contents(expected)


def test_quantized_input_is_refused(tmp_path: Path) -> None:
    out = quantize(export(BASE, random_source(BASE, 10), tmp_path / "float"), tmp_path / "out", "int8")
    with pytest.raises(InputError, match=r"is quantized already \(int8\); expected an export with float weights"):
        plan_of_export(out)


def test_half_precision_of_half_precision_is_refused(tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 10), tmp_path / "float", dtype="bfloat16")
    with pytest.raises(UsageError, match="has bfloat16 weights; expected an export in float32"):
        plan_half(plan_of_export(folder), "float16")


def test_options_of_a_scheme_for_half_precision_are_refused(tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 10), tmp_path / "float")
    with pytest.raises(UsageError, match="options of a quantization scheme with fp16"):
        plan_target(plan_of_export(folder), "float16", SchemeOptions(block_size=32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor", ["layers.1.retention.v_proj.weight", "final_norm.weight", "embedding.weight"])
@pytest.mark.parametrize("kind", ["int4", "float16"])
def test_weights_that_are_not_finite_are_refused_by_name(kind, tensor: str, value: float, tmp_path: Path) -> None:
    source = random_source(BASE, 11)
    source.tensors[tensor].flat[3] = value
    folder = export(BASE, source, tmp_path / "float")
    plan = plan_target(plan_of_export(folder), kind, SchemeOptions())
    with pytest.raises(InputError, match=f"tensor '{tensor}' holds 1 NaN or infinite value; expected finite weights"):
        write_quantized(plan, tmp_path / "out", force=False, progress=lambda count: None)
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


class _Failing(MemorySource):
    def read(self, name: str):
        if name.startswith("layers.1."):
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().read(name)


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    plan = plan_export(checkpoint(BASE, _Failing(random_source(BASE, 12).tensors)), dtype="float32", ops="fused")
    with pytest.raises(OutputError, match="the disk is full"):
        write_quantized(
            plan_quantization(plan, Scheme("int4", 64)), tmp_path / "out", force=False, progress=lambda count: None
        )
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_of_another_shape_than_the_manifest_says_is_refused(tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 13), tmp_path / "float")
    manifest = json.loads((folder / contract.MANIFEST_FILE).read_text())
    manifest["config"]["feed_forward"]["dim"] = 44
    (folder / contract.MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"another tensor 'layers\.0\.ffn\.gate_up_proj\.weight'"):
        plan_of_export(folder)


def test_codes_from_elsewhere_can_be_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(15)

    def read(tensor: StoredTensor) -> Iterator[np.ndarray]:
        if tensor.table is not None:
            yield tensor.table
        elif tensor.part is None or tensor.part.name == "scales":
            yield rng.uniform(0.01, 0.02, tensor.shape).astype(np.float32)
        else:
            yield rng.integers(0, 256, stored_bytes(tensor), dtype=np.uint8)

    for ops in ("fused", "standard"):
        plan = plan_export(checkpoint(BASE, MemorySource({})), dtype="float32", ops=ops)
        plan = plan_quantization(plan, make_scheme("int4", SchemeOptions(symmetric=False), ops=ops))
        write_export(plan, tmp_path / ops, force=False, progress=lambda count: None, read=read)
        session = DecoderSession(tmp_path / ops, threads=1)
        assert np.isfinite(session.step(np.array([3]), session.new_state())).all()


class _Learned(RoundToNearest):
    def __init__(self, seen: list) -> None:
        self.seen = seen

    def quantize(self, name, rows, format, scale_type) -> QuantizedRows:
        self.seen.append((name, rows.shape))
        return super().quantize(name, rows, format, scale_type)


def test_a_calibrated_method_sees_every_matrix_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list = []
    text = CalibrationText(Calibration("text", "00" * 32, 8), [np.arange(8)])
    made = []

    def make(config, weights, given):
        made.append((config, sorted(weights.names()), given))
        return _Learned(seen)

    monkeypatch.setitem(methods.METHODS, "learned", MethodSpec("learned", calibrated=True, make=make))
    source = random_source(BASE, 14)
    plan = plan_of_export(export(BASE, source, tmp_path / "float"))
    scheme = Scheme("int4", 64, method="learned")
    with pytest.raises(UsageError, match="--method learned without a text"):
        plan_quantization(plan, scheme)
    manifest = write_quantized(
        plan_quantization(plan, scheme, text), tmp_path / "out", force=False, progress=lambda count: None, text=text
    )
    assert manifest.quantization.calibration == text.record
    assert made == [(BASE, sorted(source.names()), text)]
    assert dict(seen) == {name: array.shape for name, array in source.tensors.items() if array.ndim == 2}
