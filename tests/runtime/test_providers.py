"""Providers: what was asked for or a refusal that says why, with failures simulated: a fake GPU, or fakes in Python."""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest

from retnet_tools.errors import InputError, ProviderError, UsageError
from retnet_tools.paper import paper_config
from retnet_tools.runtime import cuda, failures, installation, onnx_session
from retnet_tools.runtime.onnx_session import open_session
from retnet_tools.runtime.providers import PROVIDERS, CpuFallbackWarning, Device, check_device, parse_device
from tests.exports import export
from tests.fake_gpu import LIBRARIES, ROOT, FakeGpu, libraries, needs_fake_gpu
from tests.helpers import ABLATIONS, BASE, random_source

OPEN = """
import sys
from pathlib import Path
from retnet_tools.errors import RetNetToolsError
from retnet_tools.runtime import DecoderSession, parse_device
try:
    session = DecoderSession(Path(sys.argv[1]), parse_device(sys.argv[2], cpu_fallback=len(sys.argv) > 3))
    print("opened on", session.device, session._step.get_providers()[0])
except RetNetToolsError as error:
    print(error.exit_code, error)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(BASE, random_source(BASE, 1), tmp_path_factory.mktemp("providers") / "out", device="cuda")


@pytest.fixture
def unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose onnxruntime has no CUDA provider."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("text", "device"),
    [("cpu", Device("cpu")), ("CUDA", Device("cuda", 0)), ("cuda:3", Device("cuda", 3))],
)
def test_devices_are_named_as_in_torch(text: str, device: Device) -> None:
    assert parse_device(text) == device


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:x", "cpu:0", "", "cuda:-1", "cuda:99999999999"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected cpu, cuda or cuda:N"):
        parse_device(text)


@pytest.mark.usefixtures("unusable")
def test_a_cpu_only_package_is_named() -> None:
    with pytest.raises(ProviderError, match=r"no CUDA provider.*expected the package onnxruntime-gpu.*--device cpu"):
        open_session(Path("step.onnx"), Device("cuda"))


@pytest.mark.usefixtures("unusable")
def test_a_cpu_package_over_the_gpu_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    both = tuple(installation.Package(name, "1.31.1") for name in ("onnxruntime", "onnxruntime-gpu"))
    monkeypatch.setattr(installation, "packages_in_use", lambda: both)
    with pytest.raises(ProviderError) as caught:
        check_device(Device("cuda"))
    text = str(caught.value)
    assert "onnxruntime 1.31.1 and onnxruntime-gpu 1.31.1 are both installed and lie over each other" in text
    assert "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'onnxruntime-gpu[cuda,cudnn]'" in text
    assert (caught.value.exit_code, text.count("\n")) == (4, 0)


def test_a_session_that_fell_back_to_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class FellBack:
        def __init__(self, *args: object, **kwargs: object) -> None:
            asked.append(kwargs)

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnx_session, "check_device", lambda device: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", FellBack)
    with pytest.raises(ProviderError, match="CUDAExecutionProvider did not start"):
        open_session(Path("step.onnx"), Device("cuda"))
    # ONNX Runtime's own fallback would open it on the CPU and say so on stdout.
    assert asked[0]["enable_fallback"] == 0


def test_products_in_float32_do_not_use_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Opened:
        def __init__(self, *args: object, providers: list[object], **kwargs: object) -> None:
            asked.extend(providers)

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider"]

        def get_provider_graph_assignment_info(self) -> list[object]:
            return []

    monkeypatch.setattr(onnx_session, "check_device", lambda device: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Opened)
    open_session(Path("step.onnx"), Device("cuda", 2), cuda_graph=True)
    ((name, options),) = asked
    assert name == "CUDAExecutionProvider"
    assert options == {
        "device_id": "2",
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "1",
    }


def test_a_graph_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "step.onnx").write_bytes(b"not a graph")
    with pytest.raises(InputError, match="cannot be opened") as caught:
        open_session(tmp_path / "step.onnx", Device("cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("unusable")
def test_a_fallback_is_the_cpu_and_says_so(folder: Path) -> None:
    from retnet_tools.runtime import DecoderSession

    with pytest.warns(CpuFallbackWarning, match=r"no CUDA provider.*running on the CPU, as --allow-cpu-fallback says"):
        session = DecoderSession(folder, Device("cuda", cpu_fallback=True), 1)
    assert session.device == Device("cpu")
    assert session.in_place
    assert session.eager_reason == "it runs on the CPU"


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_nothing_is_warned_of_where_nothing_falls_back(where: str, folder: Path) -> None:
    from retnet_tools.runtime import DecoderSession

    with warnings.catch_warnings(), contextlib.suppress(ProviderError):
        warnings.simplefilter("error")
        DecoderSession(folder, Device(where), 1)


@needs_fake_gpu
def test_a_graph_opens_on_the_device_and_nowhere_else(folder: Path) -> None:
    result = FakeGpu(devices=2).run(OPEN, folder, "cuda:1")
    assert result.stdout == "opened on cuda:1 CUDAExecutionProvider\n"
    assert result.stderr == ""


@needs_fake_gpu
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_missing_library_is_named(library: str, folder: Path) -> None:
    if library == "libcudart.so.13" and cuda.find_libraries([library])[library] is not None:
        pytest.skip("this machine has a CUDA runtime of its own")
    result = FakeGpu(missing=(library,)).run(OPEN, folder, "cuda")
    assert result.stdout.startswith("4 the CUDA provider cannot load ")
    assert library in result.stdout.split(";")[0]
    assert result.stdout.count("\n") == 1


@needs_fake_gpu
def test_no_device_and_a_number_too_high_are_named(folder: Path) -> None:
    assert FakeGpu(devices=0).run(OPEN, folder, "cuda").stdout.startswith("4 the NVIDIA driver finds no device")
    found = FakeGpu(devices=2).run(OPEN, folder, "cuda:2").stdout
    assert found == "4 no device cuda:2; expected cuda:0 to cuda:1\n"
    assert FakeGpu().run(OPEN, folder, "cuda:1").stdout == "4 no device cuda:1; expected cuda:0\n"


@needs_fake_gpu
def test_memory_that_does_not_suffice_is_said_before_anything_is_loaded(folder: Path) -> None:
    found = FakeGpu(memory_bytes=200 << 20).run(OPEN, folder, "cuda").stdout
    assert found.startswith(f"4 step.onnx of {folder} needs 0.27 GB on cuda:0, where 0.21 GB of 0.21 GB are free; ")


@needs_fake_gpu
def test_a_node_without_a_kernel_is_refused_unless_the_cpu_is_allowed(tmp_path: Path) -> None:
    config = ABLATIONS["feature_map_elu"]
    out = export(config, random_source(config, 1), tmp_path / "out")
    refused = FakeGpu().run(OPEN, out, "cuda").stdout
    assert refused.startswith("4 4 nodes of step.onnx have no place on cuda:0: Elu (4); expected every node on the")
    allowed = FakeGpu().run(OPEN, out, "cuda", "fallback")
    assert allowed.stdout == "opened on cuda:0 CUDAExecutionProvider\n"
    assert "4 nodes of step.onnx have no place on cuda:0: Elu (4); they run on the CPU" in allowed.stderr


@needs_fake_gpu
def test_a_fallback_from_a_device_that_is_not_there(folder: Path) -> None:
    found = FakeGpu(devices=0).run(OPEN, folder, "cuda", "fallback")
    assert found.stdout == "opened on cpu CPUExecutionProvider\n"
    assert "finds no device" in found.stderr
    assert "running on the CPU" in found.stderr


@needs_fake_gpu
def test_heads_that_linear_attention_refuses_are_refused_before_they_run(tmp_path: Path) -> None:
    config = paper_config(vocab_size=61, hidden_size=320, value_dim=640, ffn_dim=40, num_layers=1, num_heads=1)
    source = random_source(config, 1)
    for_cpu = export(config, source, tmp_path / "cpu")
    found = FakeGpu().run(OPEN, for_cpu, "cuda").stdout
    assert found.startswith("4 heads of 320 x 640 in an export for the CPU; expected shapes that LinearAttention takes")
    for_cuda = export(config, source, tmp_path / "cuda", device="cuda")
    assert FakeGpu().run(OPEN, for_cuda, "cuda").stdout == "opened on cuda:0 CUDAExecutionProvider\n"


def test_what_onnxruntime_prints_while_it_looks_stays_off_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        cuda.cuda_libraries()
    assert capsys.readouterr().out == ""


@needs_fake_gpu
@pytest.mark.parametrize(("version", "name"), [(12080, "12.8"), (11040, "11.4")])
def test_a_driver_that_is_too_old_is_named(version: int, name: str, folder: Path) -> None:
    found = FakeGpu(environment={"FAKE_CUDA_DRIVER": str(version)}).run(OPEN, folder, "cuda").stdout
    assert found == (
        f"4 the NVIDIA driver runs CUDA up to {name}; expected CUDA 13, which this onnxruntime is built for; "
        "update the driver, or use --device cpu\n"
    )
    newer = FakeGpu(environment={"FAKE_CUDA_DRIVER": "14010"}).run(OPEN, folder, "cuda").stdout
    assert newer == "opened on cuda:0 CUDAExecutionProvider\n"


@needs_fake_gpu
@pytest.mark.parametrize("layout", [("cu13",), ("cudnn", "cublas", "cuda_runtime", "curand")])
def test_libraries_are_found_in_packages_that_are_not_beside_onnxruntime(
    layout: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    """As pip lays them out: all in nvidia/cu13/lib, or each in its package's own."""
    # What this machine has of its own would be found first.
    names = [name for name, path in cuda.find_libraries(LIBRARIES).items() if path is None and name != "libcuda.so.1"]
    assert len(names) >= 4
    for i, name in enumerate(names):
        place = tmp_path / "nvidia" / layout[i % len(layout)] / "lib"
        place.mkdir(parents=True, exist_ok=True)
        (place / name).symlink_to(libraries() / name)
    found = FakeGpu(missing=tuple(names), environment={"PYTHONPATH": f"{ROOT}:{tmp_path}"}).run(OPEN, folder, "cuda")
    assert found.stdout == "opened on cuda:0 CUDAExecutionProvider\n"


@needs_fake_gpu
def test_prompts_that_linear_attention_refuses_are_refused_before_they_run(tmp_path: Path) -> None:
    """With a gamma of each key dimension a CPU export walks prompts in LinearAttention, which has no such kernel."""
    outs = {}
    for k, v in ((256, 512), (128, 256)):
        plain = paper_config(vocab_size=61, hidden_size=k, value_dim=v, ffn_dim=40, num_layers=1, num_heads=1)
        normalization = replace(plain.score_normalization, by_decay=False)
        decay = tuple(-0.01 * i for i in range(k // 2))
        config = replace(plain, key_decay=decay, score_normalization=normalization)
        outs[k] = export(config, random_source(config, 1), tmp_path / f"{k}-cpu")
        outs[-k] = export(config, random_source(config, 1), tmp_path / f"{k}-cuda", device="cuda")
    assert FakeGpu().run(OPEN, outs[256], "cuda").stdout == (
        "4 prompts of 256 x 512 heads with a gamma of each key dimension in an export for the CPU; expected shapes "
        "that LinearAttention takes on CUDA; export with --device cuda\n"
    )
    for out in (outs[-256], outs[128], outs[-128]):
        assert FakeGpu().run(OPEN, out, "cuda").stdout == "opened on cuda:0 CUDAExecutionProvider\n"


@needs_fake_gpu
def test_room_for_prompts_is_checked_before_anything_is_loaded(folder: Path) -> None:
    gpu = FakeGpu(memory_bytes=400 << 20)
    code = OPEN.replace("=len(sys.argv) > 3)", "=False), prompts=len(sys.argv) > 3")
    assert gpu.run(code, folder, "cuda").stdout == "opened on cuda:0 CUDAExecutionProvider\n"
    found = gpu.run(code, folder, "cuda", "prompts").stdout
    assert found.startswith(
        f"4 step.onnx and decoder.onnx of {folder} needs 0.54 GB on cuda:0, where 0.42 GB of 0.42 GB"
    )


OTHER_KERNELS = """
import onnxruntime, sys
from retnet_tools.graph import cuda_kernels
table = cuda_kernels._table()
if "version" in sys.argv:
    onnxruntime.__version__ = "1.99.0"
if "kernel" in sys.argv:
    # As if the table, made of another version, had a kernel that this one lacks.
    table["kernels"]["Elu"] = [{}]
sys.argv[2:] = [word for word in sys.argv[2:] if word not in ("version", "kernel")]
"""


@needs_fake_gpu
def test_a_node_that_the_table_of_another_version_did_not_foresee_is_a_warning(tmp_path: Path) -> None:
    config = ABLATIONS["feature_map_elu"]
    out = export(config, random_source(config, 1), tmp_path / "out")
    code = OTHER_KERNELS + OPEN
    # The table is of the onnxruntime in use: whatever is on the CPU is refused, foreseen or not.
    for known in ((), ("kernel",)):
        found = FakeGpu().run(code, out, "cuda", *known).stdout
        assert found.startswith("4 4 nodes of step.onnx have no place on cuda:0: Elu (4); expected every node on the")
    # It is of another: what it foresaw is refused, what it did not is a warning.
    assert FakeGpu().run(code, out, "cuda", "version").stdout.startswith("4 4 nodes of step.onnx have no place")
    result = FakeGpu().run(code, out, "cuda", "version", "kernel")
    assert result.stdout == "opened on cuda:0 CUDAExecutionProvider\n"
    assert "Warning: 4 nodes of step.onnx run on the CPU beside cuda:0: Elu (4); known here are" in result.stderr
    assert "no CUDA graphs, steps run kernel by kernel: " in result.stderr


@needs_fake_gpu
def test_weights_are_shared_by_graphs_only_where_kernels_are_known(folder: Path) -> None:
    """A node that is on the CPU unforeseen would read them there."""
    code = OTHER_KERNELS + OPEN.replace("cpu_fallback=len(sys.argv) > 3)", "cpu_fallback=False), prompts=True").replace(
        'print("opened on"', 'print(session._opener._shared is not None, "opened on"'
    )
    assert FakeGpu(memory_bytes=2 << 30).run(code, folder, "cuda").stdout.startswith("True opened on cuda:0")
    result = FakeGpu(memory_bytes=2 << 30).run(code, folder, "cuda", "version")
    assert result.stdout.startswith("False opened on cuda:0")
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("CUDA failure 2: out of memory", failures.OutOfMemoryError),
        ("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer", failures.OutOfMemoryError),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", failures.OutOfMemoryError),
        ("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : no Cos(22)", failures.NoKernelError),
        ("Available memory of 100 is smaller than requested bytes of 200", failures.OutOfMemoryError),
        ("cudaErrorMemoryAllocation", failures.OutOfMemoryError),
        ("CUDNN failure 4002: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED", failures.OutOfMemoryError),
        ("IsNodeCompatibleWithProvider node.GetExecutionProviderType() was false", failures.NoKernelError),
        ("CUDA failure 209: no kernel image is available for execution on the device", ProviderError),
        ("CUDA failure 900: fake error", ProviderError),
    ],
)
def test_errors_of_other_libraries_are_types(words: str, kind: type[ProviderError]) -> None:
    assert failures.failure_type(RuntimeError(words)) is kind
    assert failures.failure_type(kind("any words: out of memory")) is kind


@needs_fake_gpu
def test_failures_on_a_device_have_their_types(folder: Path) -> None:
    code = """
import json, sys
from pathlib import Path
import numpy as np
from retnet_tools.errors import ProviderError
from retnet_tools.runtime import DecoderSession, Device
from retnet_tools.runtime.buffers import DeviceBuffer
from retnet_tools.runtime.cuda import cuda_runtime
found = []
def failing(action):
    try:
        action()
    except ProviderError as error:
        found.append([type(error).__name__, type(error.__cause__).__name__])
failing(lambda: cuda_runtime(0).allocate(1 << 40))
failing(lambda: DeviceBuffer([1 << 40], np.float32, Device("cuda")))
session = DecoderSession(Path(sys.argv[1]), Device("cuda"))
state = session.new_state()
session.step([1], state)
feeds = {"input_ids": np.array([[1]]), "position_ids": np.array([[1]])}
binding = session._graphs.binding(state, feeds)
failing(lambda: binding.run(feeds, fetch=False))
print(json.dumps(found))
"""
    found = FakeGpu(environment={"FAKE_CUDA_CAPTURE": "901"}).evaluate(code, folder)
    assert [kind for kind, _ in found] == ["OutOfMemoryError", "OutOfMemoryError", "CaptureError"]
    assert found[1][1] == "OutOfMemoryError"


def test_each_provider_is_a_row_that_says_what_is_its_own() -> None:
    assert {row.name: row.memory is not None for row in PROVIDERS.values()} == {"cpu": False, "cuda": True}
    assert all(Device(row.name).provider is row for row in PROVIDERS.values())
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "retnet_tools" / "runtime").glob("*.py")]
    assert not [line for text in sources for line in text.splitlines() if '== "cuda"' in line or '== "cpu"' in line]
