"""Exports of random models, for tests of the graphs and of what runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from retnet_tools.config import RetNetConfig
from retnet_tools.formats import Checkpoint
from retnet_tools.graph.contract import (
    ATTENTION_MASK,
    INPUT_IDS,
    INPUTS_EMBEDS,
    LOGITS_INDICES,
    PAST_CONV_NAMES,
    PAST_NAMES,
    POSITION_IDS,
    TensorSpec,
    padding_id,
    state_shape,
)
from retnet_tools.graph.export import plan_export, write_export
from retnet_tools.weights import Array, WeightSource


def checkpoint(config: RetNetConfig, source: WeightSource) -> Checkpoint:
    """A checkpoint in memory."""
    return Checkpoint(Path("random"), "random", config, source, [], [], [])


def export(
    config: RetNetConfig,
    source: WeightSource,
    out: Path,
    *,
    ops: str = "fused",
    dtype: str = "float32",
    state_dtype: str = "float32",
    target: str = "onnx",
    device: str = "cpu",
    opset: int | None = None,
) -> Path:
    """Export to a folder and return it."""
    opened = checkpoint(config, source)
    plan = plan_export(opened, dtype=dtype, ops=ops, state_dtype=state_dtype, target=target, device=device, opset=opset)
    write_export(plan, out, force=False, progress=lambda count: None)
    return out


def cpu_runner(graph: Path, *, exact: bool = False) -> Callable[[dict[str, Array]], list[Array]]:
    """The graph on ONNX Runtime's CPU provider.

    Args:
        exact: multiply quantized weights of standard operators in float32 (fused ones say so themselves).
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)


def zero_states(config: RetNetConfig, batch: int, dtype: Any = np.float32) -> list[Array]:
    """States before the first token."""
    return [np.zeros((batch, *state_shape(config)), dtype) for _ in range(config.num_layers)]


def run_steps(
    run: Callable[[dict[str, Array]], list[Array]],
    ids: Array,
    states: list[Array],
    position: int | Array = 0,
) -> Iterator[tuple[Array, list[Array]]]:
    """Feed `[B, T]` tokens (or `[B, T, D]` embeddings) one by one; yields logits `[B, vocab]` and states after each."""
    name = INPUT_IDS if ids.ndim == 2 else INPUTS_EMBEDS
    start = np.broadcast_to(np.asarray(position, dtype=np.int64), (ids.shape[0],))
    for n in range(ids.shape[1]):
        feeds = {name: ids[:, n : n + 1], POSITION_IDS: (start + n)[:, None]}
        logits, *states = run({**feeds, **{PAST_NAMES % i: state for i, state in enumerate(states)}})
        yield logits[:, 0], states


def run_prefill(
    run: Callable[[dict[str, Array]], list[Array]],
    ids: Array,
    states: list[Array],
    lengths: Array | None = None,
    position: int | Array = 0,
) -> tuple[Array, list[Array]]:
    """Feed `[B, T]` tokens (or `[B, T, D]` embeddings) in one chunk, the first `lengths` of each row real; logits
    `[B, vocab]` and states."""
    batch, length = ids.shape[:2]
    steps = np.arange(length)
    lengths = np.full(batch, length) if lengths is None else lengths
    start = np.broadcast_to(np.asarray(position, dtype=np.int64), (batch,))
    feeds = {
        INPUT_IDS if ids.ndim == 2 else INPUTS_EMBEDS: ids,
        POSITION_IDS: start[:, None] + steps,
        ATTENTION_MASK: (steps < lengths[:, None]).astype(np.int64),
    }
    logits, *states = run({**feeds, **{PAST_NAMES % i: state for i, state in enumerate(states)}})
    return logits[:, 0], states


def run_decoder(
    run: Callable[[dict[str, Array]], list[Array]],
    ids: Array,
    states: list[Array],
    indices: Array,
    *,
    mask: Array | None = None,
    position: int | Array = 0,
) -> tuple[Array, list[Array]]:
    """Feed `[B, T]` tokens (or `[B, T, D]` embeddings) to decoder.onnx: logits `[B, R, vocab]` at the places `indices`
    `[R]` or `[B, R]` of each row, and states.

    Args:
        mask: `[B, T]`; None for real tokens alone.
        position: of the first real token of each row; padding has position 1.
    """
    batch, length = ids.shape[:2]
    mask = np.ones((batch, length), np.int64) if mask is None else mask
    counted = np.cumsum(mask, axis=1) - 1 + np.reshape(position, (-1, 1))
    feeds = {
        INPUT_IDS if ids.ndim == 2 else INPUTS_EMBEDS: ids,
        POSITION_IDS: np.where(mask == 1, counted, 1),
        ATTENTION_MASK: mask,
        LOGITS_INDICES: np.array(np.broadcast_to(indices, (batch, np.shape(indices)[-1])), np.int64),
    }
    logits, *states = run({**feeds, **{PAST_NAMES % i: state for i, state in enumerate(states)}})
    return logits, states


def run_genai(
    run: Callable[[dict[str, Array]], list[Array]],
    config: RetNetConfig,
    ids: Array,
    states: list[Array],
    lengths: Array | None = None,
    position: int | Array = 0,
) -> tuple[Array, list[Array]]:
    """Feed `[B, T]` tokens as onnxruntime-genai does: after the first `lengths` of each row the padding token at
    position 0; logits `[B, vocab]` and states."""
    batch, length = ids.shape
    steps = np.arange(length)
    real = steps < (np.full(batch, length) if lengths is None else lengths)[:, None]
    start = np.broadcast_to(np.asarray(position, dtype=np.int64), (batch,))
    conv = [np.full((batch, 1, 1), i, np.float32) for i in range(config.num_layers)]
    logits, *after = run(
        {
            INPUT_IDS: np.where(real, ids, padding_id(config)),
            POSITION_IDS: np.where(real, start[:, None] + steps, 0),
            **{PAST_CONV_NAMES % i: value for i, value in enumerate(conv)},
            **{PAST_NAMES % i: state for i, state in enumerate(states)},
        }
    )
    assert (logits[:, 0, config.vocab_size] == np.finfo(np.float32).min).all()
    for before, passed in zip(conv, after[config.num_layers :], strict=True):
        np.testing.assert_array_equal(passed, before)
    return logits[:, 0, : config.vocab_size], after[: config.num_layers]


def check_border(model: onnx.ModelProto, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """A graph's inputs and outputs are these, by name, type and shape."""
    for values, specs in ((model.graph.input, inputs), (model.graph.output, outputs)):
        assert [value.name for value in values] == [spec.name for spec in specs]
        for value, spec in zip(values, specs, strict=True):
            tensor = value.type.tensor_type
            assert tuple(d.dim_param or d.dim_value for d in tensor.shape.dim) == spec.shape
            assert onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type) == spec.dtype
