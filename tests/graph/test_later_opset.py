"""Standard operators of opset 27: retention as one LinearAttention of ai.onnx, against float64, onnx's reference
evaluator and the onnxruntime that has it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from retnet_tools.errors import InputError, UsageError
from retnet_tools.formats.canonical import write_canonical
from retnet_tools.graph import contract
from retnet_tools.graph.cuda_kernels import cpu_nodes
from retnet_tools.graph.export import plan_export, plan_of_export
from retnet_tools.graph.folder import load_graph
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.graph.targets import TARGET_DEVICES, TARGETS
from retnet_tools.weights import Array
from tests import later_runtime
from tests.exports import checkpoint, export, run_prefill, run_steps, zero_states
from tests.helpers import ABLATIONS, BASE, OTHER_LAYERS, random_source, random_tokens
from tests.pairs import pairwise
from tests.quantized import decoded_source, quantize
from tests.reference import reference_logits
from tests.tolerances import GRAPH_FLOAT16, GRAPH_FLOAT32

DTYPES = ("float32", "float16", "bfloat16")
RUN = ("base", "no_decay", "key_decay", "stack", "shared_key_value_heads", *OTHER_LAYERS)
needs_runtime = pytest.mark.skipif(later_runtime.why_not() is not None, reason=str(later_runtime.why_not()))


def export_27(name: str, out: Path, *, seed: int = 1, **options: str) -> Path:
    return export(ABLATIONS[name], random_source(ABLATIONS[name], seed), out, ops="standard", opset=27, **options)


def reference_runner(graph: Path) -> later_runtime.Run:
    evaluator = ReferenceEvaluator(str(graph))
    return lambda feeds: evaluator.run(None, feeds)


def check_run(folder: Path, expected: Array, tolerance: float) -> None:
    """Hold what `run_graphs` has left to logits `[B, T, vocab]`."""
    ran = np.load(folder / "ran.npz")
    for way in later_runtime.WAYS:
        np.testing.assert_allclose(ran[f"{way} steps"].swapaxes(0, 1), expected, rtol=0, atol=tolerance)
        np.testing.assert_allclose(ran[f"{way} prompt"], expected[:, -1], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "dtype", "target"),
    pairwise(["base", "key_decay", "head_rotation_alone", "torchscale_2023", "stack"], DTYPES, TARGETS),
)
def test_retention_is_one_standard_operator_a_layer(name: str, dtype: str, target: str, tmp_path: Path) -> None:
    config = ABLATIONS[name]
    if target == "genai" and not config.has_vocabulary:
        pytest.skip("onnxruntime-genai feeds token ids")
    folder = export_27(name, tmp_path / "out", dtype=dtype, target=target)
    for file in TARGETS[target].graphs:
        onnx.checker.check_model(str(folder / file), full_check=True)
        model = onnx.load(folder / file, load_external_data=False)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 27)]
        assert model.ir_version == onnx.helper.find_min_ir_version_for(model.opset_import)
        nodes = list(load_graph(folder / file).all_nodes())
        assert {node.domain for node in nodes} == {""}
        kinds = Counter(node.op_type for node in nodes)
        # A prompt by a gamma of each head is matrix products; two graphs are a step and a prompt.
        steps = file != contract.PREFILL_FILE
        prompts = bool(config.key_decay) and file != contract.STEP_FILE
        joined = file == contract.GENAI_FILE and prompts
        assert kinds["LinearAttention"] == config.num_layers * (1 if joined else steps + prompts)
        assert kinds["Scan"] == (config.num_layers if file == contract.GENAI_FILE and not config.key_decay else 0)
        for node in nodes:
            if node.op_type == "LinearAttention":
                assert node.attributes.get_string("update_rule") == "gated"
                assert node.attributes.get_float("scale") == 1.0
                assert (
                    node.attributes.get_int("q_num_heads")
                    == node.attributes.get_int("kv_num_heads")
                    == config.num_heads
                )


def test_opset_23_is_what_it_was(tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 1), tmp_path / "out", ops="standard")
    model = onnx.load(folder / contract.STEP_FILE, load_external_data=False)
    assert (model.opset_import[0].version, model.ir_version) == (23, 11)
    assert "LinearAttention" not in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_reference_evaluator_computes_the_same_model(name: str, tmp_path: Path) -> None:
    config, source = ABLATIONS[name], random_source(ABLATIONS[name], seed=5)
    folder, ids = export_27(name, tmp_path / "out", seed=5), random_tokens(config, 2, 9, seed=6)
    expected = reference_logits(config, source, ids)
    for step, prefill in later_runtime.runners(folder, reference_runner):
        logits, states = run_prefill(prefill, ids[:, :4], zero_states(config, 2))
        np.testing.assert_allclose(logits, expected[:, 3], rtol=0, atol=GRAPH_FLOAT32)
        for n, (logits, _) in enumerate(run_steps(step, ids[:, 4:], states, position=4), start=4):
            np.testing.assert_allclose(logits, expected[:, n], rtol=0, atol=GRAPH_FLOAT32)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp16"])
def test_the_opset_is_kept(kind: str, tmp_path: Path) -> None:
    """By a reader, and by whoever quantizes an export: as if it had been exported so."""
    floats = export_27("key_decay", tmp_path / "floats")
    assert plan_of_export(floats).opset == read_manifest(floats).opset == 27
    quantized = quantize(floats, tmp_path / "quantized", kind)
    assert read_manifest(quantized).opset == 27
    for file in (contract.STEP_FILE, contract.PREFILL_FILE):
        model = onnx.load(quantized / file, load_external_data=False)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 27)]
        kinds = Counter((node.domain, node.op_type) for node in model.graph.node)
        assert kinds["", "LinearAttention"] == BASE.num_layers
        assert {domain for domain, _ in kinds} == {""}


@needs_runtime
def test_onnxruntime_computes_the_same_model(tmp_path: Path) -> None:
    """As float64 does, and as the graphs of opset 23 in the onnxruntime of this process."""
    folders = {name: export_27(name, tmp_path / name, seed=7) for name in RUN}
    expected = {}
    for name, folder in folders.items():
        ids = random_tokens(ABLATIONS[name], 2, 40, seed=8)
        np.save(folder / "ids.npy", ids)
        expected[name] = reference_logits(ABLATIONS[name], random_source(ABLATIONS[name], 7), ids)
    assert later_runtime.run_graphs(list(folders.values())).startswith("1.32.")
    for name, folder in folders.items():
        earlier = export(ABLATIONS[name], random_source(ABLATIONS[name], 7), tmp_path / f"{name}-23", ops="standard")
        np.save(earlier / "ids.npy", np.load(folder / "ids.npy"))
        later_runtime.run_folder(earlier)
        ran, before = np.load(folder / "ran.npz"), np.load(earlier / "ran.npz")
        check_run(folder, expected[name], GRAPH_FLOAT32)
        for kind in before:
            scale = max(1.0, float(np.abs(before[kind]).max())) if "states" in kind else 1.0
            np.testing.assert_allclose(ran[kind], before[kind], rtol=0, atol=GRAPH_FLOAT32 * scale, err_msg=name)


@needs_runtime
def test_onnxruntime_runs_other_types_of_weights(tmp_path: Path) -> None:
    source, ids = random_source(BASE, 7), random_tokens(BASE, 2, 20, seed=8)
    floats, half = export_27("base", tmp_path / "a", seed=7), export_27("base", tmp_path / "b", seed=7, dtype="float16")
    codes = {kind: quantize(floats, tmp_path / kind, kind) for kind in ("int8", "int4")}
    for folder in (half, *codes.values()):
        np.save(folder / "ids.npy", ids)
    later_runtime.run_graphs([half, *codes.values()])
    expected = {half: (reference_logits(BASE, source, ids), GRAPH_FLOAT16)}
    for folder in codes.values():
        decoded = decoded_source(BASE, folder / contract.STEP_FILE)
        expected[folder] = (reference_logits(BASE, decoded, ids), GRAPH_FLOAT32)
    for folder, (logits, tolerance) in expected.items():
        check_run(folder, logits, tolerance)


@needs_runtime
def test_commands_run_it_where_that_onnxruntime_is_installed(tmp_path: Path) -> None:
    write_canonical(tmp_path / "ckpt", BASE, random_source(BASE, 1))
    folder = tmp_path / "out"
    written = later_runtime.run_module(
        "retnet_tools", "export", tmp_path / "ckpt", "--ops", "standard", "--opset", 27, "-o", folder
    )
    assert written.returncode == 0, written.stderr
    assert "note: opset 27 runs in onnxruntime 1.32 and later" in written.stdout
    held = later_runtime.run_module("retnet_tools", "verify", folder, "--against", tmp_path / "ckpt", "--tokens", 32)
    assert held.returncode == 0, held.stdout + held.stderr
    prompt = ("-p", "1 2 3", "--token-ids", "-n", 4)
    assert later_runtime.run_module("retnet_tools", "generate", folder, *prompt).returncode == 0


def test_an_older_onnxruntime_is_told_which_it_takes(tmp_path: Path, cli) -> None:
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 32):
        pytest.skip("it runs here")
    folder = export_27("base", tmp_path / "out")
    result = cli("generate", folder, "-p", "1 2 3", "--token-ids", "-n", 2)
    assert result.exit_code == 4
    assert result.err.count("\n") == 1
    assert result.err.startswith(f"error: {folder}")
    assert result.err.endswith(
        f".onnx is of ai.onnx opset 27, which onnxruntime {onnxruntime.__version__} does not run; expected "
        "onnxruntime 1.32 or later; pip install 'onnxruntime>=1.32' in place of what is installed, or export without "
        "--opset 27\n"
    )


def test_the_table_of_cuda_kernels_has_none_for_it(tmp_path: Path) -> None:
    nodes = cpu_nodes(load_graph(export_27("base", tmp_path / "out") / contract.STEP_FILE))
    assert [node.operator for node in nodes if node.reason == "no kernel"] == ["LinearAttention"] * BASE.num_layers


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--ops", "fused"), "--opset 27 with --ops fused --device cpu; expected 23; or --ops standard --device cpu"),
        (
            ("--ops", "standard", "--device", "cuda"),
            "--opset 27 with --ops standard --device cuda; expected 23; or --ops standard --device cpu",
        ),
        (("--ops", "standard", "--opset", "22"), "--opset 22 with --ops standard --device cpu; expected 23 or 27"),
    ],
)
def test_other_opsets_are_refused(options: tuple[str, ...], line: str, tmp_path: Path, cli) -> None:
    write_canonical(tmp_path / "ckpt", BASE, random_source(BASE, 1))
    result = cli("export", tmp_path / "ckpt", "--opset", "27", *options)
    assert (result.exit_code, result.err) == (2, f"error: {line}\n")
    with pytest.raises(UsageError, match="--opset 24"):
        plan_export(checkpoint(BASE, random_source(BASE, 1)), dtype="float32", ops="standard", opset=24)


def test_readers_know_the_opsets_of_every_device() -> None:
    for name, device in TARGET_DEVICES.items():
        for ops in device.operators:
            assert tuple(device.opsets(ops)) == (contract.OPSET, *contract.LATER_OPSETS.get((ops, name), ()))


def test_a_manifest_without_an_opset_is_of_23(tmp_path: Path) -> None:
    folder = export(BASE, random_source(BASE, 1), tmp_path / "out", ops="standard")
    path = folder / contract.MANIFEST_FILE
    data = json.loads(path.read_text())
    assert data.pop("opset") == 23
    path.write_text(json.dumps(data))
    assert read_manifest(folder).opset == 23
    path.write_text(json.dumps({**data, "opset": 28}))
    with pytest.raises(InputError, match=r"has opset 28; expected one of 23, 27"):
        read_manifest(folder)
