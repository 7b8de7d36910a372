"""Counts and sizes of a model against sums made here, and what is shown of them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retnet_tools.errors import InputError, RetNetToolsError
from retnet_tools.evaluate.weight_lint import lint_weights
from retnet_tools.formats import CheckpointSource
from retnet_tools.formats.canonical import write_canonical
from retnet_tools.jobs.inspect import (
    InspectRequest,
    InspectResult,
    inspect_model,
    layer_state_bytes,
    open_model,
    parameters_by_part,
)
from retnet_tools.jobs.inspect import inspect as inspect_job
from retnet_tools.reports.inspection import inspection_document, render_inspection, size_text, tokens_text
from retnet_tools.weights import canonical_shapes
from tests.exports import export
from tests.helpers import ABLATIONS, BASE, random_source


def inspect(path: Path) -> InspectResult:
    return inspect_job(InspectRequest(path))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "ckpt"
    write_canonical(path, BASE, random_source(BASE, 1))
    return path


def test_parameters_by_part_are_those_of_the_equations() -> None:
    # BASE: V 61, D 32, 2 layers, value size 48, feed-forward 40; q, k are D x D, v, gate and out D x 48.
    assert parameters_by_part(BASE) == {
        "embedding": 61 * 32,
        "retention projections": 2 * (2 * 32 * 32 + 3 * 32 * 48),
        "feed-forward": 2 * 3 * 32 * 40,
        "norms": 2 * 2 * 32 + 32,
        "output head": 61 * 32,
    }


def test_norms_of_every_kind_are_norms_and_biases_belong_to_their_part() -> None:
    parts = parameters_by_part(ABLATIONS["torchscale_2023"])
    blocks = 2 * (2 * 32 + 40) + 2 * 32  # two around the blocks and one inside the feed-forward, final and embedding
    assert parts["norms"] == 2 * blocks
    assert parts["retention projections"] == 2 * (2 * 32 * 32 + 3 * 32 * 48 + 2 * 32 + 2 * 48 + 32)
    assert parts["feed-forward"] == 2 * (2 * 32 * 40 + 40 + 32)
    channel = parameters_by_part(ABLATIONS["channel_head_norm"])
    assert channel["norms"] - parameters_by_part(BASE)["norms"] == 2 * 2 * 48


@pytest.mark.parametrize("name", ABLATIONS)
def test_parts_add_up_to_the_tensors(name: str) -> None:
    config = ABLATIONS[name]
    total = sum(int(np.prod(shape)) for shape in canonical_shapes(config).values())
    assert sum(parameters_by_part(config).values()) == total


def test_a_tied_head_has_no_parameters_of_its_own() -> None:
    tied = parameters_by_part(ABLATIONS["tied"])
    assert tied["output head"] == 0
    assert tied["embedding"] == 61 * 32


def test_the_state_is_one_matrix_a_head_and_layer() -> None:
    assert layer_state_bytes(replace(BASE, num_layers=3), "float16") == 4 * 8 * 12 * 2


def test_bytes_by_dtype_follow_the_file(tmp_path: Path) -> None:
    source = random_source(BASE, 1, np.float16)
    source.tensors["final_norm.weight"] = source.tensors["final_norm.weight"].astype(np.float32)
    write_canonical(tmp_path / "mixed", BASE, source)
    document = inspection_document(inspect(tmp_path / "mixed"))
    assert document["bytes_by_dtype"] == {
        "float16": 2 * (document["parameters"]["total"] - 32),
        "float32": 4 * 32,
    }
    (weights,) = (file for file in document["files"] if file["name"] == "model.safetensors")
    assert weights["bytes"] == (tmp_path / "mixed" / "model.safetensors").stat().st_size


def test_an_export_says_the_same_of_the_model_and_more(checkpoint: Path, tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 1), tmp_path / "out", dtype="float16")
    of_checkpoint, of_export = (inspection_document(inspect(path)) for path in (checkpoint, folder))
    for field in ("config", "parameters", "heads", "state"):
        assert of_export[field] == of_checkpoint[field]
    assert of_checkpoint["kind"] == "checkpoint"
    assert of_checkpoint["export"] is None
    assert of_export["kind"] == "export"
    assert of_export["bytes_by_dtype"]["float16"] == 2 * of_export["parameters"]["total"]
    fields = of_export["export"]
    assert (fields["dtype"], fields["state_dtype"], fields["ops"]) == ("float16", "float32", "fused")
    step = fields["graphs"]["step.onnx"]
    assert step["nodes"] == sum(step["operators"].values())
    assert step["operators"]["com.microsoft.LinearAttention"] == BASE.num_layers
    assert list(fields["graphs"]) == ["prefill.onnx", "step.onnx", "decoder.onnx"]


@pytest.mark.parametrize("name", ["", "retnet.json", "step.onnx", "weights.data"])
def test_an_export_is_known_by_any_of_its_files(name: str, tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 1), tmp_path / "out")
    assert open_model(CheckpointSource(folder / name)).manifest is not None


def test_a_checkpoint_beside_an_export_is_the_file_that_was_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 1), tmp_path / "out")
    for file in checkpoint.iterdir():
        file.rename(folder / file.name)
    assert open_model(CheckpointSource(folder / "model.safetensors")).manifest is None
    assert open_model(CheckpointSource(folder, "canonical")).manifest is None
    assert open_model(CheckpointSource(folder)).manifest is not None


def test_an_export_is_linted_tensor_by_tensor(tmp_path: Path) -> None:
    source = random_source(BASE, 1)
    source.tensors["layers.1.retention.k_proj.weight"][0, :3] = np.nan
    source.tensors["lm_head.weight"] = source.tensors["embedding.weight"]
    result = inspect(export(BASE, source, tmp_path / "out"))
    found = {finding.check: finding for finding in result.findings}
    assert sorted(found) == ["nan", "untied-duplicate"]
    assert found["nan"].where == ("layers.1.retention.qkvg_proj.weight",)
    assert found["nan"].message.startswith("3 values NaN in ")


def test_findings_are_sorted_by_severity_and_errors_or_warnings_fail(tmp_path: Path) -> None:
    source = random_source(BASE, 1)
    source.tensors["embedding.weight"][0, 0] = 1e5
    write_canonical(tmp_path / "info", BASE, source)
    result = inspect(tmp_path / "info")
    assert [f.severity for f in result.findings] == ["info"]
    result.require_clean()
    source.tensors["embedding.weight"][0, 1] = np.inf
    source.tensors["lm_head.weight"][:] = 0
    write_canonical(tmp_path / "error", BASE, source)
    result = inspect(tmp_path / "error")
    assert [f.severity for f in result.findings] == ["error", "warning", "info"]
    with pytest.raises(RetNetToolsError, match="1 error and 1 warning") as error:
        result.require_clean()
    assert error.value.exit_code == 1


def test_without_data_nothing_is_read(checkpoint: Path) -> None:
    model = open_model(CheckpointSource(checkpoint))
    (checkpoint / "model.safetensors").unlink()
    result = inspect_model(InspectRequest(checkpoint, quick=True), model)
    assert inspection_document(result)["lint"]["data_read"] is False
    assert result.tensors == len(canonical_shapes(BASE))


def test_progress_covers_every_byte(checkpoint: Path) -> None:
    weights, seen = open_model(CheckpointSource(checkpoint)).weights, list[int]()
    list(lint_weights(weights, seen.append))
    assert sum(seen) == 4 * sum(parameters_by_part(BASE).values())


def test_an_unknown_state_type_is_refused(tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 1), tmp_path / "out")
    text = (folder / "retnet.json").read_text()
    (folder / "retnet.json").write_text(text.replace('"state_dtype": "float32"', '"state_dtype": "int3"'))
    with pytest.raises(InputError, match="'int3'"):
        open_model(CheckpointSource(folder))


def test_text_holds_the_numbers_of_the_document(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = inspect(checkpoint)
    render_inspection(result)
    text = capsys.readouterr().out
    document = inspection_document(result)
    assert f"{document['parameters']['total']:,}" in text
    assert f"{document['heads'][3]['horizon_1_percent']:,.1f}" in text
    assert "retnet-tools 1" in text
    assert "lint: nothing found (23 tensors)" in text
    assert max(map(len, text.splitlines())) < 120
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("base", r"rotary_frequencies +4, 1 to 0.0001"),
        ("head_rotation_alone", r"rotary_frequencies +4 in each of 4 heads, 1 to 0.0001"),
        ("output_norm", r"output_norm +kind layer, eps 1e-05, bias yes"),
        ("parallel_residual", r"parallel_residual +yes"),
    ],
)
def test_text_says_how_the_model_is_made(
    name: str, row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_canonical(tmp_path / "out", ABLATIONS[name], random_source(ABLATIONS[name], 1))
    render_inspection(inspect(tmp_path / "out"))
    assert re.search(row, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("size", "text"), [(999, "999 bytes"), (1000, "1.00 kB"), (15_000, "15.0 kB"), (2_500_000_000, "2.50 GB")]
)
def test_sizes_are_decimal(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(("tokens", "text"), [(21.83, "21.8"), (12345.6, "12,345.6"), (3.2e11, "3.20e+11")])
def test_tokens_are_counted_in_words_that_fit(tokens: float, text: str) -> None:
    assert tokens_text(tokens) == text
    assert tokens_text(float("inf")) == "never"
