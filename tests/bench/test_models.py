"""What is measured is made ready in the types that were asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from retnet_tools.bench.floor import ProductShape
from retnet_tools.bench.implementations import alternative, retnet
from retnet_tools.bench.models import Model, ModelOptions, Precision, make_model, write_probes
from retnet_tools.bench.options import BenchOptions, Case
from retnet_tools.bench.specs import RetNetSpec, TorchSpec, TransformerSpec
from retnet_tools.errors import ProviderError, UsageError
from retnet_tools.formats import CheckpointSource
from retnet_tools.graph.quantization import Scheme, TensorRule
from retnet_tools.quantize.options import QuantizeOptions
from retnet_tools.runtime.device_memory import chunk_bytes
from retnet_tools.runtime.providers import Device
from tests.exports import cpu_runner, export
from tests.helpers import BASE, random_source
from tests.tolerances import FLOAT32

CPU, CUDA = Device("cpu"), Device("cuda")
LOGITS = 4 * 61


def quiet(what: str, done: int, total: int) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(BASE, random_source(BASE, 1), tmp_path_factory.mktemp("models") / "out")


def options(path: Path | None, **changes: object) -> ModelOptions:
    source = None if path is None else CheckpointSource(path)
    return ModelOptions(**{"source": source, "size": None, "dtype": None, "quantize": None, "ops": None, **changes})


def test_an_export_is_measured_where_it_lies(folder: Path, tmp_path: Path) -> None:
    model = make_model(options(folder), tmp_path, quiet)
    assert model.folder == folder
    assert list(tmp_path.iterdir()) == []
    assert model.precision == Precision("float32", None, "fused")
    assert model.weights is not None
    # Its own float weights, by canonical name, to judge logits by.
    expected = random_source(BASE, 1).read("layers.1.retention.v_proj.weight")
    np.testing.assert_array_equal(model.weights.read("layers.1.retention.v_proj.weight"), expected)


def test_an_export_is_quantized_for_the_time_of_a_run(folder: Path, tmp_path: Path) -> None:
    chosen = options(folder, quantize=QuantizeOptions("int4", block_size=32))
    model = make_model(chosen, tmp_path, quiet)
    assert model.folder.parent == tmp_path
    assert model.precision.quantization == "int4 in 32s"
    assert model.weights is not None


def test_half_precision_may_be_named_either_way(folder: Path, tmp_path: Path) -> None:
    assert make_model(options(folder, quantize=QuantizeOptions("fp16")), tmp_path, quiet).precision.dtype == "float16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "base"}, "one of them"),
        ({"path": None, "size": "gigantic"}, "--size 'gigantic'"),
    ],
)
def test_what_does_not_fit_together_is_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        options(**{"path": folder, **changes})


def test_progress_counts_the_megabytes_that_are_written(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    chosen = options(None, size="base", dtype="float16")
    model = make_model(chosen, tmp_path, lambda what, done, total: seen.append((done, total)))
    total = (model.folder / "weights.data").stat().st_size / 1e6
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == pytest.approx(total, rel=0.01)
    assert all(of == pytest.approx(total, rel=0.01) for _, of in seen)


def test_the_probe_is_a_product(tmp_path: Path) -> None:
    shape = ProductShape(48, 32, "float32")
    write_probes(shape, Precision("bfloat16", None, "fused"), tmp_path / "probes")
    x = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    (y,) = cpu_runner(tmp_path / "probes" / "product.onnx")({"x": x})
    from retnet_tools.random_weights import RandomWeights

    expected = x @ RandomWeights(shape.shapes).read("product.weight").T
    np.testing.assert_allclose(y, expected, rtol=0, atol=FLOAT32)
    (y,) = cpu_runner(tmp_path / "probes" / "copy.onnx")({"x": x[0]})
    np.testing.assert_array_equal(y, -x[0])


def test_implementations_are_opened_with_their_threads_and_know_their_memory(folder: Path, tmp_path: Path) -> None:
    model, chosen = make_model(options(folder), tmp_path, quiet), BenchOptions(depths=(0, 1000))
    model = Model(model.name, model.folder, BASE, model.precision, model.state_dtype, None)
    ours = retnet(model, chosen, CPU)
    assert ours.spec(3, "decode") == RetNetSpec(folder, CPU, 3, chosen.chunk_size, prompts=False)
    assert ours.spec(3, "prefill") == RetNetSpec(folder, CPU, 3, chosen.chunk_size, prompts=True)
    states = 2 * 4 * 8 * 12 * 4
    assert ours.bytes_needed(Case("decode", 8, 0, 5)) == 5 * (states + LOGITS)
    # A layer at a time is filled with random numbers.
    assert ours.bytes_needed(Case("decode", 8, 1000, 5)) == 5 * (states + LOGITS + states // 2)
    chunk = chunk_bytes(BASE, "float32", 5, 8)
    assert ours.bytes_needed(Case("prefill", 8, 1000, 5)) == 10 * states + 5 * LOGITS + chunk
    stepped = alternative("torch", model, chosen, CPU, tmp_path)
    assert stepped.spec(2, "decode") == TorchSpec(BASE, "float32", 2, CPU)
    assert (stepped.runs("decode"), stepped.runs("prefill")) == (True, False)
    transformer = alternative("transformer", model, chosen, CPU, tmp_path)
    spec = transformer.spec(1, "decode")
    assert isinstance(spec, TransformerSpec)
    assert spec.config.max_positions >= chosen.room == 1000 + 512 + 3
    test = Case("decode", 8, 1000, 5)
    cache = 5 * 2 * 2 * 32 * 4 * test.room
    heads, width = spec.config.num_heads, 2 * spec.config.ffn_dim + 4 * 32
    assert transformer.bytes_needed(test) == cache + 5 * (LOGITS + 4 * heads * test.room + 4 * width)
    # GroupQueryAttention holds the scores of a whole prompt on the CPU.
    prompt = Case("prefill", 64, 1000, 5)
    cache, scores = 5 * 2 * 2 * 32 * 4 * prompt.room, 5 * heads * 64 * prompt.room * 4
    assert transformer.bytes_needed(prompt) == cache + scores + 5 * (LOGITS + 64 * 4 * width)


@pytest.mark.parametrize(("device", "dtype"), [("cuda", "float32"), ("cpu", "bfloat16")])
def test_attention_without_a_kernel_is_refused(device: str, dtype: str, folder: Path, tmp_path: Path) -> None:
    model = Model("base", folder, BASE, Precision(dtype, None, "fused"), "float32", None)
    with pytest.raises(UsageError, match=f"--against transformer in {dtype} on {device}"):
        alternative("transformer", model, BenchOptions(), Device(device), tmp_path)


def test_graphs_of_steps_are_left_out_on_demand_for_both(folder: Path, tmp_path: Path) -> None:
    model = Model("base", folder, BASE, Precision("float16", None, "fused"), "float32", None)
    for captured in (True, False):
        chosen = BenchOptions(cuda_graph=captured)
        ours = retnet(model, chosen, CUDA).spec(None, "decode")
        theirs = alternative("transformer", model, chosen, CUDA, tmp_path / str(captured)).spec(None, "decode")
        assert (ours.cuda_graph, theirs.cuda_graph) == (captured, captured)


def test_a_gpu_holds_two_sets_of_states(folder: Path) -> None:
    model = Model("base", folder, BASE, Precision("float32", None, "fused"), "float32", None)
    assert retnet(model, BenchOptions(), CUDA).subject.buffers == {"prefill": 2, "decode": 2}
    assert retnet(model, BenchOptions(), CPU).subject.buffers == {"prefill": 2, "decode": 1}


def test_states_in_float16_are_filled_from_float32(folder: Path) -> None:
    model = Model("base", folder, BASE, Precision("float32", None, "fused"), "float16", None)
    states = 2 * 4 * 8 * 12 * 2
    needed = retnet(model, BenchOptions(), CPU).bytes_needed(Case("decode", 8, 1000, 5))
    assert needed == 5 * (states + LOGITS) + 5 * (states // 2 + states)


@pytest.mark.parametrize("rules", [{"exclude": ("lm_head",)}, {"tensor_types": (TensorRule("ffn", "int8"),)}])
def test_rules_about_retnets_matrices_do_not_fit_a_transformer(
    rules: dict[str, tuple[object, ...]], folder: Path, tmp_path: Path
) -> None:
    precision = Precision("float32", Scheme("int4", 32, **rules), "fused")
    assert precision.quantization == "int4 in 32s, mixed"
    model = Model("base", folder, BASE, precision, "float32", None)
    with pytest.raises(UsageError, match="--against transformer for int4 in 32s, mixed weights"):
        alternative("transformer", model, BenchOptions(), CPU, tmp_path)
    assert alternative("torch", model, BenchOptions(), CPU, tmp_path).name == "torch"


def test_torch_is_measured_on_the_gpu_that_retnet_is_on_or_not_at_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model("base", folder, BASE, Precision("float32", None, "fused"), "float32", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ProviderError, match="torch finds no GPU") as error:
        alternative("torch", model, BenchOptions(), CUDA, tmp_path)
    assert str(error.value).count("\n") == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    spec = alternative("torch", model, BenchOptions(), CUDA, tmp_path).spec(None, "decode")
    assert (spec.device, str(spec.device)) == (CUDA, "cuda:0")
    with pytest.raises(ProviderError, match="cuda:1"):
        alternative("torch", model, BenchOptions(), Device("cuda", 1), tmp_path)
