"""The contract of an exported folder: file names, graph inputs and outputs. Writers and the runtime read it here.

    step.onnx     input_ids [B,1], position_ids [B,1], past_key_values.{i}.recurrent_state [B,H,K,V]
                  -> logits [B,1,vocab] float32, present.{i}.recurrent_state [B,H,K,V]
    prefill.onnx  input_ids [B,T], position_ids [B,T], attention_mask [B,T] int64, the same states
                  -> logits [B,1,vocab] of the last real token of each row, the same states
    decoder.onnx  prefill.onnx with logits_indices [B,R] int64 after attention_mask
                  -> logits [B,R,vocab] of those places 0 to T-1 of each row, the same states
    weights.data  external data of all graphs, every tensor stored once
    retnet.json   the manifest, see `retnet_tools.graph.manifest`

decoder.onnx is one graph for tokens, prompts and scoring, so that a runtime that packs weights for each session holds
them once: T 1 is a step of Eq. 6, whose states may be bound in place, more is a chunk of Eq. 7. A chunk of one token
has no padding: where attention_mask says so, the row is NaN. Logits at padding mean nothing; a negative place counts
from the end of the chunk, and one outside it ends the call on the CPU.

A stack without embedding and head has inputs_embeds [B,1,D] (others [B,T,D]) float32 in place of input_ids, and
hidden_states [B,1,D] (decoder.onnx [B,R,D]) float32 in place of logits.

attention_mask is 1 at real tokens, which stand together, and 0 at padding before and after them. Padding changes
nothing, whatever its ids and positions. A row of padding alone keeps its state bit for bit; its logits are finite and
mean nothing.

What cannot be right is not a number: a row whose real tokens have gaps, whose mask has other values, or whose
position_ids do not count up by one over its real tokens has NaN logits and states, and no other row does. An id outside
the vocabulary or a position outside 0 to `MAX_POSITION`, negative ones too, ends the call on the CPU ("indices element
out of data bounds", of a lookup of positions), and makes its row NaN where no lookup is checked, as on CUDA. NaN in a
state stays in its row and reaches its logits. What a graph cannot see: a state of another text, or one that does not
stand at the position that it is fed with, nonzero at position 0 among them.

`export --to genai` writes model.onnx in place of these graphs, for onnxruntime-genai:

    model.onnx         input_ids [B,T], position_ids [B,T], past_key_values.{i}.conv_state [B,1,1] float32, same states
                       -> logits [B,1,vocab+1] of the last real token of each row, same states, present.{i}.conv_state
    genai_config.json  what onnxruntime-genai reads, see `retnet_tools.graph.genai`

There padding is where position_ids is 0 in a column other than the first, on the right; before a real token it makes
the row NaN. The padding token is a token of its own, one past the vocabulary, and its logit is the lowest float32.
conv_state is passed on as it is.

The state is the plain sum S_n = gamma S_(n-1) + k_n^T v_n (Eq. 6) with 1/sqrt(K) on k and rotated keys. It is valid
only with the position that it stands at. A sequence starts with zero states at position 0.

A float16 state holds that sum times `state_scale`, a power of two for each head, and its k and v are limited to
+-`FLOAT16_STATE_LIMIT`. The sum of powers of gamma is at most 1/(1-gamma) and at most the number of tokens, so that
|S| <= 255^2 = 65,025 at every position: float16, which ends at 65,504, cannot overflow. The recurrence itself is
computed in float32. Where one token adds less than half a step of float16 to an element, it adds nothing: a state that
grows by one and the same k and v stops short of its limit, at about half of it for gamma = 1 - 2^-12.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from retnet_tools.config import RetNetConfig

STEP_FILE = "step.onnx"
PREFILL_FILE = "prefill.onnx"
DECODER_FILE = "decoder.onnx"
GENAI_FILE = "model.onnx"
GENAI_CONFIG_FILE = "genai_config.json"
WEIGHTS_FILE = "weights.data"
MANIFEST_FILE = "retnet.json"
CARD_FILE = "README.md"
CARD_TITLE = "# RetNet, quantized"
"""A line of every card that `quantize` writes; a README without it is somebody else's."""
DEVICES = ("cpu", "cuda")
"""Devices that `retnet_tools.graph.targets` writes for; it is not needed to open an export, and slow to import."""
OPERATORS = ("standard", "fused")
"""Operator sets that it has for each."""
OPSET = 23
"""The first ai.onnx opset with RMSNormalization and RotaryEmbedding; ONNX Runtime runs both on CPU and CUDA."""
LINEAR_ATTENTION_OPSET = 27
"""The first ai.onnx opset with LinearAttention."""
LATER_OPSETS: Mapping[tuple[str, str], tuple[int, ...]] = {("standard", "cpu"): (LINEAR_ATTENTION_OPSET,)}
"""By operator set and device, opsets that there are besides `OPSET`."""
FIRST_ONNXRUNTIME: Mapping[int, str] = {LINEAR_ATTENTION_OPSET: "1.32"}
"""By opset, the first onnxruntime that runs it, where others are older."""
EXPORT_AGAIN = "export the checkpoint again"
"""What to do with a folder that does not keep the contract."""

INPUT_IDS = "input_ids"
INPUTS_EMBEDS = "inputs_embeds"
POSITION_IDS = "position_ids"
ATTENTION_MASK = "attention_mask"
LOGITS_INDICES = "logits_indices"
LOGITS = "logits"
HIDDEN_STATES = "hidden_states"

PAST_NAMES = "past_key_values.%d.recurrent_state"
PRESENT_NAMES = "present.%d.recurrent_state"
PAST_CONV_NAMES = "past_key_values.%d.conv_state"
PRESENT_CONV_NAMES = "present.%d.conv_state"

POSITION_RADIX = 4096
"""Positions are split as 4096 a + b with a, b < 4096, each with its own table of phases and powers."""
MAX_POSITION = POSITION_RADIX**2 - 1
"""The last position (16,777,215) that the graphs can place."""
FLOAT16_STATE_LIMIT = 255.0
"""Magnitude to which k (with its scale) and v are limited where the state is float16."""


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: name, ONNX element type in numpy's words, and shape with names for dynamic sizes."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]


def padding_id(config: RetNetConfig) -> int:
    """The padding token of model.onnx: one past the vocabulary, so that no prompt ends with it."""
    return config.vocab_size


def state_shape(config: RetNetConfig) -> tuple[int, int, int]:
    """Shape of one layer's state for one sequence, `[H, K, V]`."""
    return (config.num_heads, config.head_k_dim, config.head_v_dim)


def state_scale(config: RetNetConfig, state_dtype: str) -> tuple[float, ...]:
    """What the plain sum S is multiplied with in a state of this type, for each head: 1, or for float16 the largest
    power of two up to 1 - gamma (of the slowest key dimension), and 2^-24 where gamma is 1.
    """
    if state_dtype != "float16":
        return (1.0,) * config.num_heads
    scales = []
    for head, decay in enumerate(config.decay):
        log_gamma = decay + max(config.of_head(config.key_decay, head), default=0.0)
        least = max(-math.expm1(log_gamma), 1 / (MAX_POSITION + 1))
        # 1 - gamma of the paper's schedule is a power of two but for rounding.
        scales.append(float(2.0 ** math.floor(math.log2(least) + 1e-9)))
    return tuple(scales)


def step_inputs(config: RetNetConfig, state_dtype: str) -> tuple[TensorSpec, ...]:
    """Inputs of step.onnx, in order."""
    return (*_token_inputs(config, 1), *_states(config, PAST_NAMES, state_dtype))


def step_outputs(config: RetNetConfig, state_dtype: str) -> tuple[TensorSpec, ...]:
    """Outputs of step.onnx, in order; those of prefill.onnx too, at the last real token of each row."""
    logits = TensorSpec(LOGITS, "float32", ("batch", 1, config.vocab_size))
    hidden = TensorSpec(HIDDEN_STATES, "float32", ("batch", 1, config.hidden_size))
    return (logits if config.has_vocabulary else hidden, *_states(config, PRESENT_NAMES, state_dtype))


def prefill_inputs(config: RetNetConfig, state_dtype: str) -> tuple[TensorSpec, ...]:
    """Inputs of prefill.onnx, in order."""
    mask = TensorSpec(ATTENTION_MASK, "int64", ("batch", "tokens"))
    return (*_token_inputs(config, "tokens"), mask, *_states(config, PAST_NAMES, state_dtype))


def decoder_inputs(config: RetNetConfig, state_dtype: str) -> tuple[TensorSpec, ...]:
    """Inputs of decoder.onnx, in order."""
    tokens, states = _token_inputs(config, "tokens"), _states(config, PAST_NAMES, state_dtype)
    mask, indices = (
        TensorSpec(name, "int64", ("batch", size))
        for name, size in ((ATTENTION_MASK, "tokens"), (LOGITS_INDICES, "logits"))
    )
    return (*tokens, mask, indices, *states)


def decoder_outputs(config: RetNetConfig, state_dtype: str) -> tuple[TensorSpec, ...]:
    """Outputs of decoder.onnx, in order."""
    logits, *states = step_outputs(config, state_dtype)
    return (TensorSpec(logits.name, logits.dtype, ("batch", "logits", logits.shape[2])), *states)


def genai_inputs(config: RetNetConfig, state_dtype: str) -> tuple[TensorSpec, ...]:
    """Inputs of model.onnx, in order."""
    states = (*_states(config, PAST_CONV_NAMES), *_states(config, PAST_NAMES, state_dtype))
    return (*_token_inputs(config, "tokens"), *states)


def genai_outputs(config: RetNetConfig, state_dtype: str) -> tuple[TensorSpec, ...]:
    """Outputs of model.onnx, in order."""
    logits = TensorSpec(LOGITS, "float32", ("batch", 1, config.vocab_size + 1))
    return (logits, *_states(config, PRESENT_NAMES, state_dtype), *_states(config, PRESENT_CONV_NAMES))


def _token_inputs(config: RetNetConfig, tokens: str | int) -> tuple[TensorSpec, TensorSpec]:
    ids = TensorSpec(INPUT_IDS, "int64", ("batch", tokens))
    embeddings = TensorSpec(INPUTS_EMBEDS, "float32", ("batch", tokens, config.hidden_size))
    return ids if config.has_vocabulary else embeddings, TensorSpec(POSITION_IDS, "int64", ("batch", tokens))


def _states(config: RetNetConfig, names: str, dtype: str | None = None) -> tuple[TensorSpec, ...]:
    """Recurrent states of a type; without one the convolution's, which RetNet has none of."""
    shape, kind = ((1, 1), "float32") if dtype is None else (state_shape(config), dtype)
    return tuple(TensorSpec(names % i, kind, ("batch", *shape)) for i in range(config.num_layers))
