"""llama.cpp's side of llama_cpp.py: a Llama with random weights, written and measured where its packages are.

    python -P benchmarks/llama_engine.py REQUEST      a request as JSON; the reply is JSON on stdout

It loads nothing of retnet_tools that needs more than numpy. `-P`, because llama_cpp.py lies beside it and is not the
package `llama_cpp`.
"""

from __future__ import annotations

import ctypes
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np

from retnet_tools.bench.resident import anonymous_resident, peak_resident, reset_peak
from retnet_tools.random_weights import RandomWeights

LAYER = {
    "attention_norm": "attn_norm",
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.out_proj": "attn_output",
    "ffn_norm": "ffn_norm",
    "ffn.gate_proj": "ffn_gate",
    "ffn.up_proj": "ffn_up",
    "ffn.down_proj": "ffn_down",
}
NAMES = {"embedding": "token_embd", "final_norm": "output_norm", "lm_head": "output"}
"""llama.cpp's names of tensors, of a layer and of the rest, by those of `bench.transformer_graph`."""
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
BATCH = 512
"""Tokens of a prompt that it reads at once: its default."""


class Engine(Protocol):
    """What is measured on either side, of one sequence; the rest is as `retnet_tools.bench.engines.Engine` has it."""

    vocab_size: int

    def place(self, batch: int, depth: int, room: int) -> None: ...

    def feed(self, input_ids: np.ndarray) -> np.ndarray: ...


def measured(open_engine: Callable[[], Engine], test: dict[str, Any]) -> dict[str, Any]:
    """Open an implementation and time one test after a warm-up.

    Args:
        test: `kind`, `tokens`, `depth` and `room` of a `bench.options.Case`, and `warm_up`, of steps. A prompt is
            read twice, and timed the second time.

    Returns:
        Seconds that opening took, that the first call took, and the median of the timed ones; the most bytes that were
        resident while timing, mapped files included (None where the system keeps no such peak), and those of no file.
    """
    began = time.perf_counter()
    engine = open_engine()
    opening = time.perf_counter() - began
    prompt = test["kind"] == "prefill"
    warm_up = 1 if prompt else test["warm_up"]
    ids = np.random.default_rng(0).integers(0, engine.vocab_size, (1, test["tokens"] + (0 if prompt else warm_up)))
    calls = [ids, ids] if prompt else np.split(ids, ids.shape[1], axis=1)
    seconds, reset = [], False
    for n, part in enumerate(calls):
        if n == 0 or prompt:
            engine.place(1, test["depth"], test["room"])
        if n == warm_up:
            reset = reset_peak()
        began = time.perf_counter()
        engine.feed(part).argmax(axis=-1)
        seconds.append(time.perf_counter() - began)
    return {
        "opening_seconds": opening,
        "first_seconds": seconds[0],
        "seconds": statistics.median(seconds[warm_up:]),
        "peak_resident_bytes": peak_resident() if reset else None,
        "private_bytes": anonymous_resident(),
    }


class LlamaEngine:
    """`llama_cpp.Llama` with its defaults but for the threads: weights mapped, a cache of float16.

    A context is placed without reading it through: the keys and values of a prompt that was really read (`keep`) are
    loaded over and over, each time into cells of their own, and moved to the positions behind those that are there;
    llama.cpp rotates the keys to them before the next token. All of that is of its public API: state_seq_set_data,
    memory_seq_add, memory_seq_cp. As every cell then belongs to the sequence at a position of its own, attention reads
    them all, as after a prompt of that length.

    Loading needs a second sequence beside the one that is decoded, so the context has two in one cache (`kv_unified`);
    a token of one sequence costs the same with it.

    Args:
        model: a GGUF file.
        kept: of a prompt, written by `keep`.
    """

    def __init__(self, model: str, threads: int, room: int, kept: str, *, flash_attention: bool) -> None:
        import llama_cpp.llama_cpp as api
        from llama_cpp import Llama

        self._api, self._kept = api, Path(kept)
        defaults = api.llama_context_default_params

        def two_sequences() -> Any:
            parameters = defaults()
            parameters.n_seq_max, parameters.kv_unified = 2, True
            return parameters

        with patch.object(api, "llama_context_default_params", two_sequences):
            self._llama = Llama(
                model,
                n_ctx=room,
                n_batch=BATCH,
                n_threads=threads,
                n_threads_batch=threads,
                flash_attn=flash_attention,
                verbose=False,
            )
        self._context = self._llama.ctx
        self._memory = api.llama_get_memory(self._context)
        self.vocab_size = self._llama.n_vocab()

    def place(self, batch: int, depth: int, room: int) -> None:
        """`depth` tokens of kept prompts.

        Raises:
            RuntimeError: llama.cpp does not hold as many.
        """
        assert batch == 1
        api, memory = self._api, self._memory
        api.llama_memory_clear(memory, False)
        self._llama.n_tokens = depth
        if depth == 0:
            return
        kept = np.fromfile(self._kept, dtype=np.uint8)
        data, filled = kept.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)), 0
        while filled < depth:
            if api.llama_state_seq_set_data(self._context, data, len(kept), 1) == 0:
                raise RuntimeError(f"llama.cpp does not take the {len(kept)} bytes of {self._kept}")
            tokens = api.llama_memory_seq_pos_max(memory, 1) + 1
            api.llama_memory_seq_rm(memory, 1, depth - filled, -1)
            api.llama_memory_seq_add(memory, 1, 0, -1, filled)
            api.llama_memory_seq_cp(memory, 1, 0, -1, -1)
            api.llama_memory_seq_rm(memory, 1, -1, -1)
            filled += tokens
        # A token that is forgotten again: keys are rotated here, not in what is timed.
        self.feed(np.zeros((1, 1), dtype=np.int64))
        self._llama.n_tokens = depth
        api.llama_memory_seq_rm(memory, 0, depth, -1)
        held = api.llama_state_seq_get_size(self._context, 0) / len(kept) * tokens
        if api.llama_memory_seq_pos_max(memory, 0) != depth - 1 or abs(held / depth - 1) > 0.01:
            raise RuntimeError(f"llama.cpp holds {held:.0f} tokens, not {depth}")

    def feed(self, input_ids: np.ndarray) -> np.ndarray:
        """Feed tokens `[1, T]`; logits `[1, vocab]` after the last."""
        self._llama.eval(input_ids[0].tolist())
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (1, self.vocab_size))

    def keep(self) -> None:
        """Write the keys and values of the sequence, unless that was done."""
        if not self._kept.exists():
            size = self._api.llama_state_seq_get_size(self._context, 0)
            kept = (ctypes.c_uint8 * size)()
            self._api.llama_state_seq_get_data(self._context, kept, size, 0)
            self._kept.write_bytes(kept)


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request to measure; a prompt is kept for the contexts of other requests."""
    engines: list[LlamaEngine] = []

    def opened() -> LlamaEngine:
        names = ("model", "threads", "room", "kept")
        engines.append(LlamaEngine(*(request[n] for n in names), flash_attention=request["flash_attention"]))
        return engines[0]

    found = measured(opened, request)
    if request["kind"] == "prefill":
        engines[0].keep()
    return found


def write(request: dict[str, Any]) -> dict[str, Any]:
    """Write a Llama with random weights, matrices in a type of GGUF, tensor by tensor.

    Its vocabulary is one of sentence pieces that stand for nothing.

    Args:
        request: `model`, a path; `type`; `config`, the fields of a `TransformerConfig`; `shapes` of its weights.
    """
    import gguf

    config, path = request["config"], Path(request["model"])
    kind = gguf.GGMLQuantizationType[request["type"].upper()]
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{request['type'].upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_positions"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_layers"])
    writer.add_feed_forward_length(config["ffn_dim"])
    writer.add_head_count(config["num_heads"])
    writer.add_head_count_kv(config["num_kv_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_heads"])
    writer.add_layer_norm_rms_eps(config["norm_eps"])
    add_vocabulary(writer, config["vocab_size"])
    shapes = {name: tuple(shape) for name, shape in request["shapes"].items()}
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor_info(tensor_name(name), shape, np.dtype(np.float32), 4 * math.prod(shape))
        else:
            stored = gguf.quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor_info(tensor_name(name), stored, np.dtype(np.uint8), math.prod(stored), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    weights = RandomWeights(shapes)
    for name, shape in shapes.items():
        tensor = weights.read(name)
        writer.write_tensor_data(tensor if len(shape) == 1 else gguf.quants.quantize(tensor, kind))
    writer.close()
    partial.rename(path)
    return {}


def add_vocabulary(writer: Any, size: int) -> None:
    """As many tokens, of which the first are those that llama.cpp looks for."""
    import gguf

    known = ["<unk>", "<s>", "</s>", *BYTE_TOKENS]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * len(BYTE_TOKENS)]
    others = size - len(known)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*known, *(f"word{i}" for i in range(others))])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * others])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def tensor_name(name: str) -> str:
    """`blk.0.attn_q.weight` of `layers.0.attention.q_proj.weight`."""
    part = name.removesuffix(".weight")
    if not part.startswith("layers."):
        return f"{NAMES[part]}.weight"
    _, layer, part = part.split(".", 2)
    return f"blk.{layer}.{LAYER[part]}.weight"


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print(json.dumps({"measure": measure, "write": write}[request["method"]](request)))
