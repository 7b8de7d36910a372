"""Exports of small random models: healthy ones pass at the default budget, and every planted fault is caught."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import VerificationError
from retnet_tools.evaluate.budget_file import read_budget
from retnet_tools.evaluate.folder_checks import check_constants
from retnet_tools.formats import open_checkpoint
from retnet_tools.graph.manifest import parse_manifest
from retnet_tools.jobs.against import AgainstResult, Held, plan_of
from retnet_tools.jobs.api import export, verify
from retnet_tools.jobs.verify import VerifyRequest
from retnet_tools.progress import no_progress
from retnet_tools.runtime.providers import parse_device
from tests.helpers import ABLATIONS, BASE
from tests.planted_exports import (
    EDITS,
    GENAI,
    PREFILL,
    STEP,
    byte_places,
    changed_byte,
    other_tokenizer,
    plant,
    record_again,
    stored_places,
)
from tests.trials.against import write_model

TOKENS = 30
MODEL = replace(BASE, embedding_scale=5.0)


@dataclass(frozen=True)
class Exported:
    config: RetNetConfig
    checkpoint: Path
    out: Path

    def verdict(self, out: Path | None = None, **options: Any) -> AgainstResult:
        result = verify(out or self.out, against=self.checkpoint, tokens=TOKENS, threads=1, **options)
        assert isinstance(result, AgainstResult)
        return result

    def held(self, out: Path) -> Held:
        request = VerifyRequest(out, against=self.checkpoint)
        manifest, opened = parse_manifest(out), open_checkpoint(self.checkpoint)
        plan = plan_of(opened, manifest)
        return Held(request, out, manifest, opened, plan, read_budget(None), parse_device("cpu"))

    def copy(self, to: Path) -> Path:
        shutil.copytree(self.out, to)
        return to


KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16 by standard operators": {"dtype": "fp16", "ops": "standard"},
    "int8": {"quantize": "int8", "block_size": 32},
    "int4 for genai": {"quantize": "int4", "to": "genai", "symmetric": False, "ops": "standard"},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    folder = tmp_path_factory.mktemp("against")
    checkpoint, found = write_model(folder / "model", MODEL, seed=1), {}
    for kind, options in KINDS.items():
        export(checkpoint, out := folder / kind, **options)
        found[kind] = Exported(MODEL, checkpoint, out)
    return found


def failed(result: AgainstResult) -> set[str]:
    return {f"{check.part}: {check.name}" for check in result.checks if not check.passed}


@pytest.mark.parametrize("kind", KINDS)
def test_a_healthy_export_passes_with_room_to_spare(kind: str, exported: dict[str, Exported]) -> None:
    result = exported[kind].verdict()
    assert failed(result) == set()
    result.require()
    names = [(check.part, check.name) for check in result.checks]
    assert len(names) == len(set(names))
    for part in ("text", "weights", "graphs", "cost"):
        assert any(check.part == part for check in result.checks)
    for way in (
        "step by step",
        "in one piece",
        "in chunks",
        "prompt, then steps",
        "steps, then prompt",
        "ragged batch",
    ):
        for what in ("logits", "states", "top 1"):
            assert ("graphs", f"{way}: {what}") in names
    exact = [check for check in result.checks if check.name.endswith("products in floats")]
    assert bool(exact) == ("int" in kind)
    assert all(check.excess < 0.8 for check in result.checks)


@pytest.mark.parametrize(("fault", "kind"), [*zip(EDITS, itertools.cycle(KINDS), strict=False)])
def test_a_fault_in_a_graph_is_caught(fault: str, kind: str, exported: dict[str, Exported], tmp_path: Path) -> None:
    """Each in one kind of export; `python -m tests.trials.against --faults` plants all in all."""
    one = exported[kind]
    bad = one.copy(tmp_path / "bad")
    assert plant(bad, EDITS[fault], one.config)
    result = one.verdict(bad)
    assert any(name.startswith(("graphs: ", "weights: ")) for name in failed(result))
    assert not result.passed
    with pytest.raises(VerificationError, match=r"checks failed; expected at most"):
        result.require()


@pytest.mark.parametrize("graph", [STEP, PREFILL])
@pytest.mark.parametrize(
    ("kind", "fault"), [("int8", "dropped_head_norm"), ("fp16 by standard operators", "one_neighbours_gamma")]
)
def test_graphs_that_disagree_are_told_by_the_way_tokens_are_fed(
    kind: str, fault: str, graph: str, exported: dict[str, Exported], tmp_path: Path
) -> None:
    one = exported[kind]
    bad = one.copy(tmp_path / "bad")
    assert plant(bad, EDITS[fault], one.config, (graph,))
    ways = {name.removeprefix("graphs: ").partition(":")[0] for name in failed(one.verdict(bad))}
    assert ("step by step" in ways) == (graph == STEP)
    assert ("in one piece" in ways) == (graph == PREFILL)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_of_a_graph_is_held_to_the_bit(kind: str, exported: dict[str, Exported], tmp_path: Path) -> None:
    """What noise hides: one decay one step of float32 off."""
    one = exported[kind]
    for name in one.held(one.out).manifest.graphs:
        bad = one.copy(tmp_path / name)
        model = onnx.load(bad / name, load_external_data=False)
        decay = next(t for t in model.graph.initializer if t.name.startswith(("gamma", "log_gamma")))
        array = numpy_helper.to_array(decay).copy()
        array.flat[-1] = np.nextafter(array.flat[-1], array.dtype.type(0))
        decay.CopyFrom(numpy_helper.from_array(array, decay.name))
        onnx.save(model, bad / name)
        check = check_constants(bad, one.held(bad).manifest.graphs, one.held(bad).plan)
        assert (check.measured, check.passed) == (1, False)
        assert name in check.where
        shutil.rmtree(bad)
    held = one.held(one.out)
    assert check_constants(one.out, held.manifest.graphs, held.plan).passed


@pytest.mark.parametrize("kind", KINDS)
def test_any_byte_of_the_weights_is_caught_and_named(kind: str, exported: dict[str, Exported], tmp_path: Path) -> None:
    one, bad = exported[kind], exported[kind].copy(tmp_path / "bad")
    places = byte_places(bad, np.random.default_rng(3))
    assert {"table", "gap"} < places.keys()
    assert any(name.startswith("codes") for name in places) == ("int" in kind)
    held = one.held(bad)
    assert all(check.passed for check in held.weights(no_progress))
    for name, (place, flip) in places.items():
        changed_byte(bad, place, flip)
        found = [check for check in held.weights(no_progress) if not check.passed]
        assert found, name
        assert all(check.where for check in found)
        changed_byte(bad, place, flip)
    changed_byte(bad, *places["table"])
    assert failed(one.verdict(bad)) >= {"weights: tables of positions"}


def test_another_tokenizer_is_caught(exported: dict[str, Exported], tmp_path: Path) -> None:
    one, bad = exported["fp32"], exported["fp32"].copy(tmp_path / "bad")
    assert other_tokenizer(bad)
    assert failed(one.verdict(bad)) == {"text: tokenizer.json"}
    (bad / "tokenizer.json").unlink()
    assert failed(one.verdict(bad)) == {"text: tokenizer.json", "files: sizes and sha256"}


def test_other_end_tokens_are_caught_and_settings_of_search_are_not(
    exported: dict[str, Exported], tmp_path: Path
) -> None:
    one, bad = exported["int4 for genai"], exported["int4 for genai"].copy(tmp_path / "bad")
    file = bad / "genai_config.json"
    text = file.read_text()
    file.write_text(text.replace('"max_length": 4096', '"max_length": 100'))
    assert one.verdict(bad).passed
    file.write_text(text.replace('"eos_token_id": 61', '"eos_token_id": 3'))
    assert failed(one.verdict(bad)) == {"text: genai_config.json"}


def test_codes_chosen_by_their_effect_are_held_as_matrices_and_files(tmp_path: Path) -> None:
    """What one code of GPTQ should be nobody knows without its text; the record of the export does."""
    checkpoint, text = write_model(tmp_path / "model", BASE, seed=6), tmp_path / "text.txt"
    text.write_text(" ".join(f"t{n}" for n in np.random.default_rng(0).integers(0, 61, 2000)))
    options = {"quantize": "int4", "method": "gptq", "calibration": text, "calibration_tokens": 1024}
    export(checkpoint, tmp_path / "out", **options)
    one = Exported(BASE, checkpoint, tmp_path / "out")
    assert failed(one.verdict()) == set()
    offset, size, _ = stored_places(one.out)["layers.0.ffn.down_proj.weight.codes"]
    data = bytearray((one.out / "weights.data").read_bytes())
    data[offset] ^= 1
    (one.out / "weights.data").write_bytes(data)
    assert failed(one.verdict()) == {"files: sizes and sha256"}
    data[offset : offset + size] = data[offset : offset + size][::-1]
    (one.out / "weights.data").write_bytes(data)
    record_again(one.out)
    assert "weights: what matrices lose" in failed(one.verdict())


def test_another_checkpoint_is_caught(exported: dict[str, Exported], tmp_path: Path) -> None:
    one = exported["fp32"]
    same_shape = write_model(tmp_path / "other", MODEL, seed=2)
    result = replace(one, checkpoint=same_shape).verdict()
    assert "weights: float weights" in failed(result)
    other = write_model(tmp_path / "more", replace(MODEL, num_layers=1), seed=1)
    result = replace(one, checkpoint=other).verdict()
    assert failed(result) == {"text: configuration"}
    assert "weights and graphs were not looked at" in result.notes[-1]


def test_a_missing_graph_kernel_is_a_failed_check_and_no_crash(exported: dict[str, Exported], tmp_path: Path) -> None:
    """A graph that ONNX Runtime opens and then gives up on: ids of padding that reach the embedding."""
    one, bad = exported["fp32"], exported["fp32"].copy(tmp_path / "bad")
    assert plant(bad, EDITS["ignored_mask"], one.config)
    assert "graphs: padding: runs" in failed(one.verdict(bad))


@pytest.mark.parametrize("name", ["stack", "key_decay", "tied", "shared_key_value_heads", "no_head_norm"])
def test_other_architectures_pass(name: str, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    checkpoint = write_model(tmp_path / "model", config, seed=4)
    export(checkpoint, tmp_path / "out", quantize="int8" if name == "tied" else None)
    result = Exported(config, checkpoint, tmp_path / "out").verdict()
    assert failed(result) == set()
    assert any(check.part == "cost" for check in result.checks) == config.has_vocabulary


def test_float16_states_pass_and_lose_no_decay(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "model", BASE, seed=5)
    export(checkpoint, tmp_path / "out", state_dtype="fp16", dtype="fp16")
    one = Exported(BASE, checkpoint, tmp_path / "out")
    assert failed(one.verdict()) == set()
    bad = one.copy(tmp_path / "bad")
    assert plant(bad, EDITS["neighbours_gamma"], BASE, (PREFILL, GENAI))
    assert "graphs: in one piece: states" in failed(one.verdict(bad))


def test_where_the_worst_figure_was_is_named(exported: dict[str, Exported], tmp_path: Path) -> None:
    one, bad = exported["fp32"], exported["fp32"].copy(tmp_path / "bad")
    assert plant(bad, EDITS["transposed_state"], one.config)
    (states,) = [check for check in one.verdict(bad).checks if check.name == "in one piece: states"]
    assert states.where.startswith(f"layer {MODEL.num_layers - 1}, head ")


def test_a_budget_decides(exported: dict[str, Exported], tmp_path: Path) -> None:
    strict = tmp_path / "strict.toml"
    strict.write_text("schema_version = 1\n[cost.int8]\nmean_kl = 0.0\n")
    assert failed(exported["int8"].verdict(budget=strict)) == {"cost: mean KL divergence"}
    assert exported["fp32"].verdict(budget=strict).passed
