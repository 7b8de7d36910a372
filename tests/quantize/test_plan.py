"""Quantized folders: whole or not there, the same by either way, every tensor once."""

from __future__ import annotations

import errno
import hashlib
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
from retnet_tools.graph.code_types import BlockFormat
from retnet_tools.graph.export import plan_export, plan_of_export, write_export
from retnet_tools.graph.folder import read_graphs
from retnet_tools.graph.manifest import Manifest, read_manifest
from retnet_tools.graph.quantization import Calibration, HalfScheme, Quality, Quantization, Scheme
from retnet_tools.graph.weight_tensors import WeightTensor
from retnet_tools.quantize import methods
from retnet_tools.quantize.blockwise import QuantizedRows
from retnet_tools.quantize.calibration import CalibrationText
from retnet_tools.quantize.card import update_record
from retnet_tools.quantize.methods import MethodSpec, round_to_nearest
from retnet_tools.quantize.options import QuantizeOptions
from retnet_tools.quantize.plan import plan_blocks, plan_half
from retnet_tools.quantize.steps import plan_quantized, write_quantized
from retnet_tools.runtime.session import DecoderSession
from tests.exports import checkpoint, export
from tests.helpers import ABLATIONS, BASE, OTHER_LAYERS, MemorySource, random_source, random_tokens
from tests.quantized import decoded_source, quantize
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
@pytest.mark.parametrize("name", ["base", "tied", "torchscale_2023", *OTHER_LAYERS])
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
    options = QuantizeOptions("int4", exclude=("layers.0.*k_proj",), tensor_types=("v_proj=int8",))
    at_once = plan_quantized(plan, options)
    write_quantized(at_once, tmp_path / "at_once", force=False)
    write_export(plan, tmp_path / "float", force=False, progress=lambda count: None)
    later = plan_quantized(plan_of_export(tmp_path / "float"), options)
    write_quantized(later, tmp_path / "later", force=False)
    assert contents(tmp_path / "later") == contents(tmp_path / "at_once")


@pytest.mark.parametrize("target", ["onnx", "genai"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("ops", ["fused", "standard"])
def test_half_precision_equals_an_export_in_it(ops: str, dtype: str, target: str, tmp_path: Path) -> None:
    source = random_source(BASE, 3)
    folder = export(BASE, source, tmp_path / "float", ops=ops, target=target)
    plan = plan_half(plan_of_export(folder), dtype)
    write_quantized(plan, tmp_path / "half", force=False)
    expected = contents(export(BASE, source, tmp_path / "expected", ops=ops, dtype=dtype, target=target))
    found = contents(tmp_path / "half")
    assert found.keys() - expected.keys() == {"README.md"}
    assert {name: found[name] for name in expected if name != "retnet.json"} == {
        name: content for name, content in expected.items() if name != "retnet.json"
    }
    manifest = read_manifest(tmp_path / "half")
    half = replace(manifest, quantization=None, files={n: r for n, r in manifest.files.items() if n != "README.md"})
    assert half == read_manifest(tmp_path / "expected")
    sizes = [(tmp_path / name / contract.WEIGHTS_FILE).stat().st_size for name in ("float", "half")]
    assert manifest.quantization == Quantization(HalfScheme(dtype), *sizes)
    card = found["README.md"].decode()
    assert f"{dtype} weights and activations, rtn" in card
    assert f"| matrices | 18 {dtype} |" in card
    assert f"{sizes[1] / sizes[0]:.1%} of" in card


def test_a_state_does_not_depend_on_how_a_half_type_was_asked_for(tmp_path: Path) -> None:
    source = random_source(BASE, 3)
    plan = plan_half(plan_of_export(export(BASE, source, tmp_path / "float")), "float16")
    write_quantized(plan, tmp_path / "half", force=False)
    exported = export(BASE, source, tmp_path / "expected", dtype="float16")
    assert read_manifest(tmp_path / "half").fingerprint() == read_manifest(exported).fingerprint()


def test_half_precision_weights_can_be_quantized(tmp_path: Path) -> None:
    plan = plan_half(plan_of_export(export(BASE, random_source(BASE, 3), tmp_path / "float")), "float16")
    write_quantized(plan, tmp_path / "half", force=False)
    record = read_manifest(quantize(tmp_path / "half", tmp_path / "out", "int4")).quantization
    assert record.scheme.type == "int4"
    assert record.float_bytes == (tmp_path / "half" / contract.WEIGHTS_FILE).stat().st_size


def test_the_record_reads_back_and_counts_the_bytes(tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 4), tmp_path / "float")
    out = quantize(folder, tmp_path / "out", "int4", block_size=32)
    before, after = read_manifest(folder), read_manifest(out)
    assert before.quantization is None
    assert after.quantization.scheme == Scheme("int4", 32)
    assert after.quantization.float_bytes == (folder / contract.WEIGHTS_FILE).stat().st_size
    assert after.quantization.weight_bytes == (out / contract.WEIGHTS_FILE).stat().st_size
    assert replace(after, quantization=None, files=before.files) == before


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
    assert read_manifest(out).files["README.md"].sha256 == hashlib.sha256(card.encode()).hexdigest()


def test_figures_that_cannot_be_written_leave_manifest_and_card_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(manifest: Manifest) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = quantize(export(BASE, random_source(BASE, 4), tmp_path / "float"), tmp_path / "out", "int4")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    record = replace(
        read_manifest(out).quantization, quality=Quality("held.txt", "cd" * 32, 512, 12.5, 12.25, 0.03, 1.0)
    )
    monkeypatch.setattr(Manifest, "to_json", full)
    with pytest.raises(OutputError, match="the disk is full"):
        update_record(out, record)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


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
    last = max(start + length for start, length in places(out).values())
    assert last == read_manifest(out).quantization.weight_bytes == (out / contract.WEIGHTS_FILE).stat().st_size


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
    plan_blocks(plan, Scheme("int4", 64))
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
        plan_quantized(plan_of_export(folder), QuantizeOptions("float16", block_size=32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor", ["layers.1.retention.v_proj.weight", "final_norm.weight", "embedding.weight"])
@pytest.mark.parametrize("kind", ["int4", "float16"])
def test_weights_that_are_not_finite_are_refused_by_name(kind, tensor: str, value: float, tmp_path: Path) -> None:
    source = random_source(BASE, 11)
    source.tensors[tensor].flat[3] = value
    folder = export(BASE, source, tmp_path / "float")
    plan = plan_quantized(plan_of_export(folder), QuantizeOptions(kind))
    with pytest.raises(InputError, match=f"tensor '{tensor}' holds 1 NaN or infinite value; expected finite weights"):
        write_quantized(plan, tmp_path / "out", force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


class _Failing(MemorySource):
    def read(self, name: str):
        if name.startswith("layers.1."):
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().read(name)


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    plan = plan_export(checkpoint(BASE, _Failing(random_source(BASE, 12).tensors)), dtype="float32", ops="fused")
    with pytest.raises(OutputError, match="the disk is full"):
        write_quantized(plan_blocks(plan, Scheme("int4", 64)), tmp_path / "out", force=False)
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

    def read(tensor: WeightTensor) -> Iterator[np.ndarray]:
        if tensor.table is not None:
            yield tensor.table
        elif tensor.part is None or tensor.part.name == "scales":
            yield rng.uniform(0.01, 0.02, tensor.shape).astype(np.float32)
        else:
            yield rng.integers(0, 256, tensor.stored_bytes, dtype=np.uint8)

    for ops in ("fused", "standard"):
        plan = plan_export(checkpoint(BASE, MemorySource({})), dtype="float32", ops=ops)
        plan = plan_quantized(plan, QuantizeOptions("int4", symmetric=False))
        write_export(plan, tmp_path / ops, force=False, progress=lambda count: None, read=read)
        session = DecoderSession(tmp_path / ops, threads=1)
        assert np.isfinite(session.step(np.array([3]), session.new_state())).all()


def test_a_new_export_takes_the_card_of_a_quantized_one_away_and_leaves_other_readmes(tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 4), tmp_path / "float")
    out = quantize(folder, tmp_path / "out", "int4")
    write_export(plan_of_export(folder), out, force=True, progress=lambda count: None)
    assert contents(out) == contents(folder)
    for record in (None, "int4"):
        other = tmp_path / f"other-{record}"
        quantize(folder, other, "int4") if record else export(BASE, random_source(BASE, 4), other)
        (other / "README.md").write_text("# My model\n")
        write_export(plan_of_export(folder), other, force=True, progress=lambda count: None)
        assert (other / "README.md").read_text() == "# My model\n"


def test_a_card_does_not_take_the_place_of_somebody_elses_readme(tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 4), tmp_path / "float")
    out = export(BASE, random_source(BASE, 4), tmp_path / "out")
    (out / "README.md").write_text("# My model\n")
    before = contents(out)
    for kind in ("int4", "float16"):
        plan = plan_quantized(plan_of_export(folder), QuantizeOptions(kind))
        with pytest.raises(UsageError, match=r"README.md is no card that this command wrote; .*move it away"):
            write_quantized(plan, out, force=True)
    assert contents(out) == before


def test_an_export_is_not_written_over_itself(tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 4), tmp_path / "float")
    (tmp_path / "link").symlink_to(folder)
    before = contents(folder)
    plan = plan_blocks(plan_of_export(folder), Scheme("int4", 64))
    for out in (folder, tmp_path / "link"):
        with pytest.raises(UsageError, match="is both input and output; expected another output"):
            write_quantized(plan, out, force=True)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("dtype", "action"), [("float16", "use --quantize bf16, or keep float32"), ("bfloat16", "keep float32")]
)
def test_weights_that_a_half_type_cannot_hold_are_refused_with_what_quantize_has(
    dtype, action: str, tmp_path: Path
) -> None:
    source = random_source(BASE, 11)
    source.tensors["final_norm.weight"][3] = 3.4e38
    plan = plan_half(plan_of_export(export(BASE, source, tmp_path / "float")), dtype)
    with pytest.raises(InputError, match=r"'final_norm.weight' has the value 3.4e.38, which") as refusal:
        write_quantized(plan, tmp_path / "out", force=False)
    assert refusal.value.action == action


def test_content_of_another_length_is_refused_by_name(tmp_path: Path) -> None:
    plan = plan_export(checkpoint(BASE, random_source(BASE, 9)), dtype="float32", ops="fused")

    def short(tensor: WeightTensor) -> Iterator[np.ndarray]:
        yield np.zeros(tensor.stored_bytes - (tensor.name == "final_norm.weight"), dtype=np.uint8)

    with pytest.raises(
        InputError, match=r"127 bytes for tensor 'final_norm.weight'; expected 128, by its shape \[32\]"
    ):
        write_export(plan, tmp_path / "out", force=False, progress=lambda count: None, read=short)
    assert list(tmp_path.iterdir()) == []


def test_blocks_with_inexact_scales_are_recorded(tmp_path: Path) -> None:
    source = random_source(BASE, 16)
    source.tensors["layers.0.ffn.up_proj.weight"][5, :32] = 1e-5
    folder = export(BASE, source, tmp_path / "float", dtype="float16")
    out = quantize(folder, tmp_path / "out", "int8", block_size=32)
    assert read_manifest(out).quantization.coarse_blocks == 1
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "1 blocks have weights so small that their scale is below the normal numbers of float16" in card
    decoded = decoded_source(BASE, out / contract.STEP_FILE).tensors["layers.0.ffn.up_proj.weight"]
    assert (decoded[5, :32] > 0).all()


def test_fewer_tokens_than_inputs_are_noted(tmp_path: Path) -> None:
    plan = plan_export(checkpoint(BASE, random_source(BASE, 9)), dtype="float32", ops="fused")
    for tokens, noted in ((47, True), (48, False)):
        text = CalibrationText(Calibration("text", "00" * 32, tokens), np.zeros((1, tokens), dtype=np.int64))
        notes = plan_blocks(plan, Scheme("int4", 64, method="gptq"), text).notes
        assert any(f"{tokens} tokens to calibrate on are fewer than the 48 inputs" in n for n in notes) == noted


def test_a_calibrated_method_sees_every_matrix_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list = []
    text = CalibrationText(Calibration("text", "00" * 32, 8), np.arange(8)[None])
    made = []

    def quantize_and_note(name, rows, format, scale_type) -> QuantizedRows:
        seen.append((name, rows.shape))
        return round_to_nearest(name, rows, format, scale_type)

    def make(task):
        made.append((task.config, sorted(task.weights.names()), task.text, set(task.formats.values()), task.dtype))
        return quantize_and_note

    monkeypatch.setitem(methods.METHODS, "learned", MethodSpec("learned", calibrated=True, make=make))
    source = random_source(BASE, 14)
    plan = plan_of_export(export(BASE, source, tmp_path / "float"))
    scheme = Scheme("int4", 64, method="learned")
    with pytest.raises(UsageError, match="--method learned without a text"):
        plan_blocks(plan, scheme)
    quantized = plan_blocks(plan, scheme, text)
    manifest = write_quantized(quantized, tmp_path / "out", force=False)
    assert manifest.quantization.calibration == text.record
    assert made == [(BASE, sorted(source.names()), text, {BlockFormat(4, 64, True)}, np.float32)]
    assert dict(seen) == {name: array.shape for name, array in source.tensors.items() if array.ndim == 2}
