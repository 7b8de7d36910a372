"""Graphs of a folder as they are opened: threads by the size of the work, weights on a GPU once for both graphs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from retnet_tools.graph.contract import PAST_NAMES, PREFILL_FILE, STEP_FILE
from retnet_tools.paper import paper_config
from retnet_tools.runtime import DecoderSession, opening
from retnet_tools.runtime.device_memory import LIBRARY_BYTES, graph_bytes
from retnet_tools.runtime.onnx_session import open_session
from retnet_tools.runtime.opening import stored_tensors
from retnet_tools.runtime.providers import Device
from tests.exports import export, zero_states
from tests.fake_gpu import FakeGpu, needs_fake_gpu
from tests.helpers import ABLATIONS, BASE, random_source
from tests.quantized import quantize

OPENED = """
import gc, json, sys
from pathlib import Path
import numpy as np
from retnet_tools.runtime import DecoderSession, Device
from retnet_tools.runtime.cuda import cuda_runtime
used = lambda: -cuda_runtime(0).memory()[0]
before = used()
session = DecoderSession(Path(sys.argv[1]), Device("cuda"), prompts=len(sys.argv) > 2)
step = used() - before
session.open_prefill()
both = used() - before
state = session.new_state(2)
session.prefill(np.zeros((2, 9), dtype=int), state)
for _ in range(4):
    session.step(np.zeros(2, dtype=int), state)
shared = session._opener._shared
found = {} if shared is None else {
    name: [value.element_type(), value.shape(), int(buffer.read().sum(dtype=np.int64))]
    for (name, value), buffer in zip(shared._values.items(), shared._buffers)
}
reason = session.eager_reason
del session, state, shared
gc.collect()
print(json.dumps([step, both, used() - before, reason, found]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 MB of weights."""
    config = paper_config(vocab_size=20_000, hidden_size=512, value_dim=512, ffn_dim=32, num_layers=1, num_heads=2)
    return export(config, random_source(config, 1), tmp_path_factory.mktemp("shared") / "out", device="cuda")


@needs_fake_gpu
def test_weights_lie_on_the_device_once_where_prompts_are_due(folder: Path) -> None:
    size = graph_bytes(folder / STEP_FILE)
    step, both, _, reason, _ = FakeGpu(memory_bytes=2 << 30).evaluate(OPENED, folder, "prompts")
    assert reason is None
    assert size <= step <= both < 1.1 * size
    step, both, _, _, _ = FakeGpu(memory_bytes=2 << 30).evaluate(OPENED, folder)
    assert both > 1.9 * size


@needs_fake_gpu
@pytest.mark.parametrize("bits", [None, "int8", "int4"])
def test_they_are_the_bytes_of_the_file_in_its_types(bits: str | None, folder: Path, tmp_path: Path) -> None:
    out = folder if bits is None else quantize(folder, tmp_path / "out", bits, block_size=32, accuracy_level=0)
    _, _, left, reason, found = FakeGpu(memory_bytes=2 << 30).evaluate(OPENED, out, "prompts")
    assert reason is None
    tensors = stored_tensors([out / STEP_FILE, out / PREFILL_FILE])
    assert found == {
        name: [t.dtype.value, list(t.shape.numpy()), int(np.frombuffer(t.tobytes(), np.uint8).sum(dtype=np.int64))]
        for name, t in tensors.items()
    }
    # Of what a session itself leaves behind there is no weight.
    assert left < 0.1 * graph_bytes(out / STEP_FILE)


@needs_fake_gpu
def test_a_memory_that_holds_them_once_suffices(folder: Path) -> None:
    memory = 2 * LIBRARY_BYTES + graph_bytes(folder / STEP_FILE) * 3 // 2
    result = FakeGpu(memory_bytes=memory).run(OPENED, folder, "prompts")
    assert json.loads(result.stdout)[3] is None


REFUSED = """
import json, sys
from pathlib import Path
from retnet_tools.errors import ProviderError
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.runtime.opening import GraphOpener
from retnet_tools.runtime.providers import Device
manifest = read_manifest(Path(sys.argv[1]))
opener = GraphOpener(Path(sys.argv[1]), manifest, Device("cuda"), None, None)
try:
    opener.open_step(prompts=True)
except ProviderError as error:
    print(json.dumps([str(error), opener._shared is None]))
"""


@needs_fake_gpu
def test_a_graph_with_nodes_on_the_cpu_is_refused_and_gets_no_weights_of_the_device(tmp_path: Path) -> None:
    config = ABLATIONS["feature_map_elu"]
    out = export(config, random_source(config, 1), tmp_path / "out")
    error, unshared = FakeGpu().evaluate(REFUSED, out)
    assert error.startswith("4 nodes of step.onnx have no place on cuda:0: Elu (4)")
    assert unshared


@pytest.mark.parametrize("bits", [None, "int8", "int4"])
@pytest.mark.parametrize("name", [STEP_FILE, PREFILL_FILE])
def test_a_graph_computes_the_same_with_weights_that_it_is_given(name: str, bits: str | None, tmp_path: Path) -> None:
    """On the CPU, where kernels compute: names, shapes and types are those that ONNX Runtime loads itself."""
    out = export(BASE, random_source(BASE, 1), tmp_path / "float", device="cuda")
    if bits is not None:
        out = quantize(out, tmp_path / bits, bits, block_size=32, accuracy_level=0)
    tensors = stored_tensors([out / name])
    values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(np.array(t.numpy())) for n, t in tensors.items()}
    zeros = {n: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros_like(t.numpy())) for n, t in tensors.items()}
    feeds = {"input_ids": np.array([[3]]), "position_ids": np.array([[0]])}
    feeds |= {"attention_mask": np.array([[1]])} if name == PREFILL_FILE else {}
    feeds |= dict(zip(past_names(), zero_states(BASE, 1), strict=True))
    plain, given, without = (
        open_session(out / name, Device("cpu"), 1, weights=weights).run(None, feeds)
        for weights in (None, values, zeros)
    )
    for own, other in zip(plain, given, strict=True):
        np.testing.assert_array_equal(own, other)
    assert np.abs(plain[0]).max() > 0.1
    assert not np.array_equal(without[0], plain[0])


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 2), (64, 32)])
def test_threads_are_as_many_as_the_weights_of_a_step_occupy(
    cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "allowed_cores", lambda: cores)
    assert opening.session_threads(19_000_000, 1) == 1
    assert opening.session_threads(1 << 32, 1) == expected
    assert opening.session_threads(1 << 20, 1 << 12) == expected


def test_small_models_step_with_one_thread_and_a_number_that_is_given_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "allowed_cores", lambda: 2)
    monkeypatch.setattr(opening, "BYTES_OF_A_THREAD", 1 << 22)
    out = export(BASE, random_source(BASE, 1), tmp_path / "out")
    for given, step, prompt in ((None, 1, 2), (3, 3, 3)):
        session = DecoderSession(out, threads=given)
        found = [graph.get_session_options().intra_op_num_threads for graph in (session._step, session._decoder)]
        assert found == [step, prompt]
        assert (session._step is session._decoder) == (given is not None)


def test_many_packed_weights_have_one_session_for_all_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "allowed_cores", lambda: 2)
    monkeypatch.setattr(opening, "BYTES_OF_A_THREAD", 1 << 22)
    monkeypatch.setattr(opening, "MOST_COPIED", 1 << 10)
    out = export(BASE, random_source(BASE, 1), tmp_path / "out")
    session = DecoderSession(quantize(out, tmp_path / "int8", "int8", block_size=32))
    assert session._step is session._decoder
    assert session._step.get_session_options().intra_op_num_threads == 2


def past_names() -> list[str]:
    return [PAST_NAMES % i for i in range(BASE.num_layers)]
