"""Device memory: sizes against what is really there, and one line where it does not suffice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from retnet_tools.errors import ProviderError
from retnet_tools.graph.contract import PREFILL_FILE, STEP_FILE
from retnet_tools.graph.manifest import read_manifest
from retnet_tools.paper import model_size
from retnet_tools.runtime import cuda
from retnet_tools.runtime.device_memory import (
    check_device_memory,
    chunk_bytes,
    enough_memory,
    graph_bytes,
    state_bytes,
    tensor_bytes,
)
from retnet_tools.runtime.providers import Device
from tests.exports import export
from tests.fake_gpu import FakeGpu, needs_fake_gpu
from tests.helpers import BASE, random_source

ALLOCATE = """
import ctypes, sys
from pathlib import Path
from retnet_tools.errors import RetNetToolsError
from retnet_tools.runtime import DecoderSession, Device
session = DecoderSession(Path(sys.argv[1]), Device("cuda"))
try:
    session.new_state(int(sys.argv[2]))
    print("there was room")
except RetNetToolsError as error:
    print(error.exit_code, error)
"""


class Memory:
    """A device with so many bytes free."""

    def __init__(self, free: int) -> None:
        self.free = free

    def memory(self) -> tuple[int, int]:
        return self.free, 10**10


@pytest.fixture
def nearly_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "cuda_runtime", lambda index: Memory(2 * 10**9))


def test_a_graph_needs_its_weights_and_tables(tmp_path: Path) -> None:
    out = export(BASE, random_source(BASE, 1), tmp_path / "out", dtype="float16")
    weights = 2 * sum(array.size for array in random_source(BASE, 1).tensors.values())
    tables = 4 * 4096 * (4 * BASE.head_k_dim // 2 + 3 * BASE.num_heads)
    assert graph_bytes(out / STEP_FILE) == graph_bytes(out / PREFILL_FILE) == weights + tables


@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 1), (3, 2), (7, 4)])
def test_the_last_code_of_four_bits_takes_a_byte(count: int, size: int) -> None:
    tensor = ir.ExternalTensor("weights.data", 0, size, ir.DataType.INT4, shape=ir.Shape([count]), name="x")
    assert tensor_bytes(tensor) == size


def test_states_come_in_one_or_two_sets(tmp_path: Path) -> None:
    manifest = read_manifest(export(BASE, random_source(BASE, 1), tmp_path / "out"))
    state = 4 * BASE.num_layers * BASE.num_heads * BASE.head_k_dim * BASE.head_v_dim
    assert state_bytes(manifest, 3, buffers=1) == 3 * (state + 4 * 61)
    assert state_bytes(manifest, 3, buffers=2) == 3 * (2 * state + 4 * 61)


def test_a_chunk_grows_with_rows_and_with_the_square_of_its_tokens() -> None:
    config = model_size("1.3b").config(50257)
    one, two = (chunk_bytes(config, "float16", 1, tokens) for tokens in (256, 512))
    assert chunk_bytes(config, "float16", 4, 256) == 4 * one
    assert 2 * one < two < 4 * one
    # The scores of 8 heads alone, and less than the weights.
    assert 3 * 4 * 8 * 512**2 < two < 1.3e9


@pytest.mark.usefixtures("nearly_full")
def test_memory_is_refused_before_it_is_asked_for() -> None:
    check_device_memory(Device("cuda"), 2 * 10**9, "a model")
    check_device_memory(Device("cpu"), 10**15, "a model")
    with pytest.raises(ProviderError) as caught:
        check_device_memory(Device("cuda", 1), 2 * 10**9 + 10**7, "a model")
    assert str(caught.value) == (
        "a model needs 2.01 GB on cuda:1, where 2.00 GB of 10.00 GB are free; a smaller batch, --dtype fp16, "
        "--quantize int8 or int4, another device, or --device cpu"
    )
    assert caught.value.exit_code == 4


@pytest.mark.usefixtures("nearly_full")
@pytest.mark.parametrize(
    "text",
    [
        "CUDA failure 2: out of memory ; GPU=0",
        "cudaErrorMemoryAllocation",
        "Failed to allocate memory for requested buffer of size 1024",
        "Available memory of 1024 is smaller than requested bytes of 2048",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
        "CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED",
        "CUDNN failure 4005: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)
def test_a_failed_allocation_says_what_it_was_for(text: str) -> None:
    with (
        pytest.raises(ProviderError, match=r"a chunk needs about 3\.00 GB more on cuda:0, where 2\.00 GB of 10\.00 GB"),
        enough_memory(Device("cuda"), "a chunk", 3 * 10**9),
    ):
        raise RuntimeError(text)


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="something else"), enough_memory(Device("cuda"), "a chunk", 1):
        raise RuntimeError("something else")
    with pytest.raises(RuntimeError, match="out of memory"), enough_memory(Device("cpu"), "a chunk", 1):
        raise RuntimeError("out of memory")


@needs_fake_gpu
def test_states_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    out = export(BASE, random_source(BASE, 1), tmp_path / "out")
    gpu = FakeGpu(memory_bytes=400 << 20)
    assert gpu.run(ALLOCATE, out, 1000).stdout == "there was room\n"
    batch = (400 << 20) // (np.float32().nbytes * BASE.num_heads * BASE.head_k_dim * BASE.head_v_dim)
    found = gpu.run(ALLOCATE, out, batch).stdout
    assert found.startswith(f"4 a buffer of [{batch}, 4, 8, 12] float32 needs about 0.42 GB more on cuda:0, where 0.4")
    assert found.count("\n") == 1
