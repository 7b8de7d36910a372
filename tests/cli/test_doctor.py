"""`retnet-tools doctor`: the whole picture, and exit codes that scripts can use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from retnet_tools.runtime import diagnosis, selftest
from retnet_tools.runtime.cuda import CudaDevice
from retnet_tools.runtime.providers import Device
from retnet_tools.runtime.selftest import CONFIG, float64_logits, run_selftest
from retnet_tools.weights import canonical_shapes
from tests.exports import export
from tests.fake_gpu import LIBRARIES, FakeGpu, needs_fake_gpu
from tests.helpers import ABLATIONS, BASE, random_source, random_tokens
from tests.reference import reference_logits
from tests.tolerances import FLOAT64

APP = "-m retnet_tools.cli.app"


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose onnxruntime has no CUDA provider."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])


@pytest.mark.usefixtures("no_cuda")
def test_the_cpu_is_fine_and_tested(cli) -> None:
    result = cli("doctor", "--json")
    assert result.exit_code == 0
    document = json.loads(result.out)
    assert (document["schema_version"], document["device"], document["usable"]) == (1, "cpu", True)
    assert document["packages"]["numpy"] == np.__version__
    assert "no CUDA provider" in document["cuda_problem"]
    assert document["telemetry_disabled"] is True
    assert (document["packed_folder"], document["packed_bytes"]) == (None, 0)
    (test,) = document["self_test"]
    assert test["passed"]
    assert 0 < max(test["prefill_error"], test["step_error"]) < 1e-4


@pytest.mark.usefixtures("no_cuda")
def test_a_device_that_cannot_be_used_is_exit_code_4_after_the_report(tmp_path: Path, cli) -> None:
    out = export(BASE, random_source(BASE, 1), tmp_path / "out", device="cuda")
    result = cli("doctor", out, "--device", "cuda")
    assert result.exit_code == 4
    assert result.err.startswith("error: cuda:0 cannot be used (this onnxruntime has no CUDA provider")
    assert result.err.count("\n") == 1
    assert "step.onnx" in result.out
    assert "for cuda, predicted from the kernels of onnxruntime" in result.out
    assert "cuda:0       not usable" in result.out
    assert "self-test    cpu: passed" in result.out


@pytest.mark.usefixtures("no_cuda")
def test_what_would_leave_the_device_is_named(tmp_path: Path, cli) -> None:
    config = ABLATIONS["feature_map_elu"]
    out = export(config, random_source(config, 1), tmp_path / "out")
    document = json.loads(cli("doctor", out, "--device", "cuda", "--no-self-test", "--json").out)
    graphs = {graph["name"]: graph for graph in document["folder"]["graphs"]}
    assert graphs["step.onnx"]["on_cpu"] == graphs["prefill.onnx"]["on_cpu"] == {"Elu": 4}
    assert graphs["step.onnx"]["nodes"]["CPU"] == 4
    assert graphs["prefill.onnx"]["nodes"]["CPU"] == 6
    assert graphs["step.onnx"]["predicted"]
    assert document["self_test"] is None


def test_a_self_test_that_fails_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, cli) -> None:
    monkeypatch.setattr(selftest, "float64_logits", lambda *args: float64_logits(*args) + 0.01)
    result = cli("doctor")
    assert result.exit_code == 1
    assert result.err.startswith("error: the self-test failed")
    assert "cpu: failed" in result.out
    assert "logits are off by 1.00e-02, more than 0.001" in result.out


def test_a_self_test_that_gives_nan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "float64_logits", lambda *args: float64_logits(*args) * np.nan)
    (test,) = run_selftest([Device("cpu")])
    assert not test.passed


def test_a_self_test_on_a_device_that_is_not_there_fails_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    (test,) = run_selftest([Device("cuda", 3)])
    assert (test.device, test.passed) == ("cuda:3", False)
    assert "no CUDA provider" in str(test.problem)


def test_the_self_tests_own_reference_is_another_ones() -> None:
    """Written twice, apart: in the package for users, and in the tests."""
    source = random_source(CONFIG, 3)
    assert set(source.tensors) == set(canonical_shapes(CONFIG))
    tokens = random_tokens(CONFIG, 2, 5, 4)
    expected = reference_logits(CONFIG, source, tokens)
    np.testing.assert_allclose(float64_logits(CONFIG, source, tokens), expected, rtol=0, atol=FLOAT64)


def test_devices_and_libraries_are_listed(monkeypatch: pytest.MonkeyPatch, cli) -> None:
    found = CudaDevice(0, "NVIDIA H100", (9, 0), 85_000_000_000, 132, 227 << 10)
    memory = (diagnosis.DeviceMemory(found, 80_000_000_000),)
    monkeypatch.setattr(diagnosis, "_devices", lambda: ("13.0", memory))
    monkeypatch.setattr(
        diagnosis.cuda, "cuda_libraries", lambda: {"libcudart.so.13": "/lib/libcudart.so.13", "x": None}
    )
    out = cli("doctor", "--no-self-test").out
    assert "driver       for CUDA up to 13.0" in out
    assert "library      libcudart.so.13: /lib/libcudart.so.13" in out
    assert "library      x: missing" in out
    assert "cuda:0       NVIDIA H100, compute capability 9.0, 85.0 GB, 80.0 GB free" in out


def test_two_packages_that_lie_over_each_other_are_said(monkeypatch: pytest.MonkeyPatch, cli) -> None:
    from retnet_tools.runtime import installation

    both = tuple(installation.Package(name, "1.31.1") for name in ("onnxruntime", "onnxruntime-gpu"))
    monkeypatch.setattr(installation, "packages_in_use", lambda: both)
    assert "clash        onnxruntime 1.31.1 and onnxruntime-gpu 1.31.1 are both" in cli("doctor", "--no-self-test").out


def test_what_is_no_export_is_refused(tmp_path: Path, cli) -> None:
    result = cli("doctor", tmp_path)
    assert (result.exit_code, result.err.count("\n")) == (5, 1)


@needs_fake_gpu
def test_a_gpu_that_computes_nothing_is_found_out(tmp_path: Path) -> None:
    out = export(BASE, random_source(BASE, 1), tmp_path / "out", device="cuda")
    result = FakeGpu().run(APP, "doctor", out, "--device", "cuda", "--json", check=False)
    assert result.returncode == 1
    document = json.loads(result.stdout)
    assert document["usable"]
    assert {Path(path).name for path in document["libraries"].values()} == set(LIBRARIES)
    graphs = {graph["name"]: graph for graph in document["folder"]["graphs"]}
    assert set(graphs["step.onnx"]["nodes"]) == {"CUDA"}
    assert graphs["prefill.onnx"]["nodes"]["CPU"] == 2
    assert not graphs["step.onnx"]["predicted"]
    cpu, gpu = document["self_test"]
    assert (cpu["passed"], gpu["passed"], gpu["eager_reason"]) == (True, False, None)


@needs_fake_gpu
def test_a_missing_library_is_exit_code_4(tmp_path: Path) -> None:
    result = FakeGpu(missing=("libcudnn.so.9",)).run(APP, "doctor", "--device", "cuda", "--no-self-test", check=False)
    assert result.returncode == 4
    assert "library      libcudnn.so.9: missing" in result.stdout
    assert "cannot load libcudnn.so.9" in result.stderr
