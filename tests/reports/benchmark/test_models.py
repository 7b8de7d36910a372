"""What is measured is made ready in the types that were asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retnet_tools.errors import UsageError
from retnet_tools.graph.probes import ProductShape
from retnet_tools.quantize.scheme import SchemeOptions
from retnet_tools.reports.benchmark.implementations import alternative, retnet
from retnet_tools.reports.benchmark.models import Model, ModelOptions, Precision, make_model, write_probes
from retnet_tools.reports.benchmark.options import BenchOptions, Case
from retnet_tools.reports.benchmark.specs import RetNetSpec, TorchSpec, TransformerSpec
from retnet_tools.runtime.providers import Device
from tests.exports import cpu_runner, export
from tests.helpers import BASE, random_source
from tests.tolerances import FLOAT32

CPU = Device("cpu")


def quiet(what: str, done: int, total: int) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(BASE, random_source(BASE, 1), tmp_path_factory.mktemp("models") / "out")


def options(path: Path | None, **changes: object) -> ModelOptions:
    return ModelOptions(**{"path": path, "size": None, "dtype": None, "quantize": None, "ops": None, **changes})


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
    chosen = options(folder, quantize="int4", scheme=SchemeOptions(block_size=32))
    model = make_model(chosen, tmp_path, quiet)
    assert model.folder.parent == tmp_path
    assert model.precision.quantization == "int4 in 32s"
    assert model.weights is not None


def test_half_precision_may_be_named_either_way(folder: Path, tmp_path: Path) -> None:
    assert make_model(options(folder, quantize="fp16"), tmp_path, quiet).precision.dtype == "float16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "base"}, "one of them"),
        ({"path": None, "size": "gigantic"}, "--size 'gigantic'"),
        ({"quantize": "int5"}, "--quantize 'int5'"),
        ({"scheme": SchemeOptions(block_size=32)}, "without --quantize"),
    ],
)
def test_what_does_not_fit_together_is_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        options(**{"path": folder, **changes})


def test_progress_counts_the_bytes_that_are_written(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    chosen = options(None, size="base", dtype="float16")
    model = make_model(chosen, tmp_path, lambda what, done, total: seen.append((done, total)))
    total = (model.folder / "weights.data").stat().st_size
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
    assert ours.spec(3) == RetNetSpec(folder, CPU, 3, chosen.chunk_size)
    states = 2 * 4 * 8 * 12 * 4
    assert ours.bytes_needed(Case("decode", 8, 1000, 5)) == 5 * states
    assert ours.bytes_needed(Case("prefill", 8, 1000, 5)) == 10 * states
    torch = alternative("torch", model, chosen, CPU, tmp_path)
    assert torch.spec(2) == TorchSpec(BASE, "float32", 2)
    assert set(torch.buffers) == {"decode"}
    transformer = alternative("transformer", model, chosen, CPU, tmp_path)
    spec = transformer.spec(1)
    assert isinstance(spec, TransformerSpec)
    assert spec.config.max_positions >= chosen.room == 1000 + 512 + 3
    test = Case("decode", 8, 1000, 5)
    assert transformer.bytes_needed(test) == 5 * 2 * 2 * 32 * 4 * test.room


@pytest.mark.parametrize(("device", "dtype"), [("cuda", "float32"), ("cpu", "bfloat16")])
def test_attention_without_a_kernel_is_refused(device: str, dtype: str, folder: Path, tmp_path: Path) -> None:
    model = Model("base", folder, BASE, Precision(dtype, None, "fused"), "float32", None)
    with pytest.raises(UsageError, match=f"--against transformer in {dtype} on {device}"):
        alternative("transformer", model, BenchOptions(), Device(device), tmp_path)
