"""Providers, with failures simulated where the machine has no GPU."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest

from retnet_tools.errors import InputError, ProviderError, UsageError
from retnet_tools.runtime import providers
from retnet_tools.runtime.providers import Device, open_session, parse_device


@pytest.mark.parametrize(
    ("text", "device"),
    [("cpu", Device("cpu")), ("CUDA", Device("cuda", 0)), ("cuda:3", Device("cuda", 3))],
)
def test_devices_are_named_as_in_torch(text: str, device: Device) -> None:
    assert parse_device(text) == device


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:x", "cpu:0", "", "cuda:-1"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected cpu, cuda or cuda:N"):
        parse_device(text)


def test_a_cpu_only_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match="no CUDA provider; expected the package onnxruntime-gpu"):
        open_session(Path("step.onnx"), Device("cuda"))


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(providers, "missing_libraries", lambda: ["libcudnn.so.9"])
    with pytest.raises(ProviderError, match=r"cannot load libcudnn\.so\.9.*--device cpu") as caught:
        open_session(Path("step.onnx"), Device("cuda"))
    assert caught.value.exit_code == 4


def test_a_session_that_fell_back_to_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class FellBack:
        def __init__(self, *args: object, **kwargs: object) -> None: ...

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(providers, "missing_libraries", lambda: [])
    monkeypatch.setattr(onnxruntime, "InferenceSession", FellBack)
    with pytest.raises(ProviderError, match="CUDAExecutionProvider did not start"):
        open_session(Path("step.onnx"), Device("cuda"))


def test_a_graph_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "step.onnx").write_bytes(b"not a graph")
    with pytest.raises(InputError, match="cannot be opened") as caught:
        open_session(tmp_path / "step.onnx", Device("cpu"))
    assert "\n" not in str(caught.value)
