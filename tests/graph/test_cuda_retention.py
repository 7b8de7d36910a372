"""The forms of retention for CUDA: shape by shape against the kernel's conditions, and exact when keys are split."""

from __future__ import annotations

import json

import numpy as np
import pytest

from retnet_tools.graph.cuda_ops import KernelForm, step_form, step_kernel, tokens_form
from tests.fake_gpu import FakeGpu, needs_fake_gpu

PAPER_HEADS = [(256, 512), (256, 432)]


def shared_memory(k: int, v: int) -> int:
    """Bytes of `S_smem[K * V]`, `k_buf[K]` and `s_scratch[max(K, V)]` in float32."""
    return 4 * k * v + 4 * k + 4 * max(k, v)


@pytest.mark.parametrize(
    ("heads", "form"),
    [
        ((64, 64), KernelForm("columns", 1)),
        ((128, 256), KernelForm("columns", 1)),
        ((256, 512), KernelForm("columns", 2)),
        ((512, 1024), KernelForm("columns", 4)),
        ((192, 384), KernelForm("columns", 3)),
        ((256, 432), KernelForm("warps", 1)),
        ((128, 200), KernelForm("warps", 1)),
        ((64, 54), KernelForm("warps", 1)),
        ((160, 320), KernelForm()),
        ((32, 64), KernelForm()),
        ((8, 12), KernelForm()),
    ],
)
def test_one_token(heads: tuple[int, int], form: KernelForm) -> None:
    assert step_form(*heads) == form


@pytest.mark.parametrize("k", [1, 7, 8, 60, 64, 96, 128, 160, 256, 384, 512])
@pytest.mark.parametrize("v", [1, 12, 54, 64, 200, 432, 512, 1000, 1024, 1025])
def test_many_tokens_meet_a_kernel_that_takes_them(k: int, v: int) -> None:
    form = tokens_form(k, v)
    part = k // form.key_splits
    assert part * form.key_splits == k
    if form.kernel == "columns":
        assert part in (64, 128)
        assert v % 32 == 0
    elif form.kernel == "shared":
        assert shared_memory(part, v) <= 99 * 1024
        assert max(part, v) <= 1024
        fewer = [s for s in range(1, form.key_splits) if k % s == 0]
        assert all(shared_memory(k // s, v) > 99 * 1024 or max(k // s, v) > 1024 for s in fewer)
    else:
        assert form.kernel is None
        assert v > 1024


@pytest.mark.parametrize("heads", PAPER_HEADS)
def test_the_papers_heads_are_past_the_recurrent_kernel_of_every_device(heads: tuple[int, int]) -> None:
    assert shared_memory(*heads) > 227 * 1024
    assert step_kernel(*heads, shared_bytes=227 * 1024) == "warps"
    assert tokens_form(*heads).key_splits > 1


def test_a_shape_that_the_operator_refuses_is_known() -> None:
    assert step_kernel(160, 320, shared_bytes=227 * 1024) == "shared"
    assert step_kernel(160, 320, shared_bytes=163 * 1024) is None
    assert step_kernel(320, 640, shared_bytes=227 * 1024) is None
    assert step_kernel(8, 1025, shared_bytes=227 * 1024) is None


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_splitting_keys_is_exact_and_leaves_the_state_where_it_lies(parts: int) -> None:
    rng = np.random.default_rng(0)
    heads, k, v = 3, 16, 10
    state, gamma = rng.standard_normal((heads, k, v)), rng.uniform(0.9, 1, (heads, 1, 1))
    key, query, value = (
        rng.standard_normal((heads, k)),
        rng.standard_normal((heads, k)),
        rng.standard_normal((heads, v)),
    )
    whole = gamma * state + key[:, :, None] * value[:, None, :]
    output = np.einsum("hk,hkv->hv", query, whole)
    cut = state.reshape(heads * parts, k // parts, v)
    assert np.shares_memory(cut, state)
    split = (
        np.repeat(gamma, parts, 0) * cut + key.reshape(heads * parts, -1, 1) * np.repeat(value, parts, 0)[:, None, :]
    )
    partial = np.einsum("hk,hkv->hv", query.reshape(heads * parts, -1), split).reshape(heads, parts, v)
    np.testing.assert_array_equal(split.reshape(heads, k, v), whole)
    np.testing.assert_allclose(partial.sum(1), output, rtol=0, atol=1e-13)


RUN = """
import json, sys
import numpy as np, onnxruntime as ort
from onnx import TensorProto, helper
ort.set_default_logger_severity(4)
found = []
for heads, k, v, tokens in json.loads(sys.argv[1]):
    shapes = {"q": (1, tokens, heads * k), "k": (1, tokens, heads * k), "v": (1, tokens, heads * v)}
    shapes |= {"s": (1, heads, k, v), "g": (1, tokens, heads)}
    info = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    node = helper.make_node(
        "LinearAttention", list(shapes), ["o", "n"], domain="com.microsoft", update_rule="gated", scale=1.0,
        q_num_heads=heads, kv_num_heads=heads,
    )
    outputs = [info("o", shapes["v"]), info("n", shapes["s"])]
    graph = helper.make_graph([node], "g", [info(*item) for item in shapes.items()], outputs)
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=11)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    providers = ["CUDAExecutionProvider"]
    session = ort.InferenceSession(model.SerializeToString(), options, providers=providers, enable_fallback=0)
    binding = session.io_binding()
    for name, shape in shapes.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, "f4"), "cuda", 0))
    for name in ("o", "n"):
        binding.bind_output(name, "cuda")
    try:
        session.run_with_iobinding(binding)
        found.append(True)
    except Exception as error:
        assert "LinearAttention" in str(error), error
        found.append(False)
print(json.dumps(found))
"""
SIZES = [(k, v) for k in (8, 64, 128, 160, 256, 320) for v in (54, 64, 320, 432, 512, 640, 1025)]


@needs_fake_gpu
def test_the_operator_takes_and_refuses_the_shapes_that_the_table_says() -> None:
    """The fake device has the 227 KiB and 132 multiprocessors of an H100; the operator's own checks run."""
    tokens = (1, 64)
    cases = [(2, k, v, t) for k, v in SIZES for t in tokens]
    found = dict(zip(cases, FakeGpu().evaluate(RUN, json.dumps(cases)), strict=True))
    for k, v in SIZES:
        assert found[2, k, v, 1] == (step_kernel(k, v, shared_bytes=227 * 1024) is not None), (k, v)
        fits = shared_memory(k, v) <= 227 * 1024 and max(k, v) <= 1024
        assert found[2, k, v, 64] == (fits or (k in (64, 128) and v % 32 == 0)), (k, v)
    assert False in found.values()


@needs_fake_gpu
def test_the_operator_takes_every_form_that_is_exported() -> None:
    cases = []
    for k, v in SIZES:
        for form, tokens in ((step_form(k, v), 1), (tokens_form(k, v), 1), (tokens_form(k, v), 64)):
            if form.kernel is not None:
                cases.append((2 * form.key_splits, k // form.key_splits, v, tokens))
    assert all(FakeGpu().evaluate(RUN, json.dumps(cases)))
