"""model.onnx and genai_config.json for onnxruntime-genai: one graph for prompt and decoding.

What goes wrong there without a word, and so has to be known:

- Beam search gives wrong texts (`num_beams` must be 1): the states of the beams are not reordered.
- Before `append_tokens` after `generate_next_token`, call `get_logits`, or the last token never reaches the state.
- A row without a token means nothing. (Padding on the left makes a row NaN.)

What onnxruntime-genai refuses itself: `rewind_to(k)` for k > 0 without `snapshot_state()` at k, `append_tokens` twice
in a batch, `chunk_size` for a batch, batches of more than 32, and its `Engine`, which wants attention it can page.
Found with onnxruntime-genai 0.18.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx_ir import Value

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import UsageError
from retnet_tools.graph import contract
from retnet_tools.graph.builder import TokenInputs
from retnet_tools.graph.decay import ChunkDecay, Chunks, chunk_decay
from retnet_tools.graph.decoders import PrefillBuilder
from retnet_tools.graph.nodes import GraphBuilder, Pair
from retnet_tools.tokenizing.carried import CarriedText
from retnet_tools.tokenizing.files import TOKENIZER_FILE
from retnet_tools.tokenizing.special import TOKENIZER_CONFIG_FILE
from retnet_tools.weights import Array

DEFAULT_MAX_LENGTH = 4096
"""`max_length` where a program names none, so that a generation ends; the prompt counts too."""
PROVIDER_OPTIONS = {"enable_cuda_graph": "0", "use_tf32": "0"}


class GenaiBuilder(PrefillBuilder):
    """One token by the recurrence (Eq. 6), more by chunks of 128 (Eq. 7): cost and memory are linear in the prompt.

    onnxruntime-genai pads a batch on the right with its padding token and gives it position 0; every real token but
    the first of a sequence has a higher one. A row that has ended is fed the padding token at positions that count on:
    any embedding will do there, since nobody reads the result. Positions are each row's own.

    Logits have 1 in place of T, which onnxruntime-genai takes as the last real token of each row, and a column more
    than the vocabulary for the padding token: its search indexes them by every token of the sequence.
    """

    name = "retnet_genai"
    input_specs = staticmethod(contract.genai_inputs)
    output_specs = staticmethod(contract.genai_outputs)
    _one_token: Value
    _chunks: Chunks
    _conv_states: list[Value]

    def read(self, inputs: Sequence[Value]) -> TokenInputs:
        """Padding is where position_ids is 0 in a column other than the first."""
        g = self.g
        tokens, position_ids, *self._conv_states = inputs
        zero, one = g.int64("zero", 0), g.int64("one", 1)
        padding = g.int64("padding_id", contract.padding_id(self.config))
        tokens = g.op("Where", g.op("Equal", tokens, padding), zero, tokens)
        self.measure(position_ids, position_ids)
        first = g.op("Equal", g.op("Range", zero, self._length, one), zero)  # [T]
        real = g.op("Or", first, g.op("Not", g.op("Equal", position_ids, zero)))
        self._one_token = g.op("Equal", self._length, one)
        return self.take(self.blank_padding(g, tokens, position_ids, g.cast(real, "bool", "int64")))

    def chunk_decay(self, g: GraphBuilder, log_gamma: Array, start: Value, end: Value) -> ChunkDecay:
        """Several chunks of one length; the first token of each row is real, so that `start` is 0."""
        self._chunks = Chunks(g, self._shape, self._length)
        start, end = g.constant("first", np.zeros((1, 1), np.int64)), self._chunks.counts(g, end)
        return chunk_decay(g, log_gamma, self._chunks.size, start, end)

    def retention(self, q: Value, k: Value, v: Value, past: Value) -> Pair:
        """A step, or chunks one after another."""
        decay = self._decay
        if isinstance(decay, Value):
            return super().retention(q, k, v, past)
        y, present = self.g.branch(
            self._one_token,
            lambda body: self.ops.retention_step(body, q, k, v, past, self._step),
            lambda body: self.ops.retention_chunks(body, q, k, v, past, decay, self._chunks),
        )
        return y, present

    def logits(self, x: Value) -> Value:
        """Logits `[B, 1, vocab + 1]`."""
        lowest = self.g.float32("lowest", float(np.finfo(np.float32).min))
        return self.g.op("Pad", super().logits(x), self.g.integers(0, 1), lowest, self.g.integers(-1))

    def further_outputs(self) -> list[Value]:
        """conv_state, which RetNet has none of; onnxruntime-genai finds no recurrent_state without it."""
        return [self.g.op("Identity", state) for state in self._conv_states]


def genai_files(config: RetNetConfig, text: CarriedText, provider: str | None) -> dict[str, str]:
    """genai_config.json, and a tokenizer_config.json where tokenizer.json lies alone, which is not read otherwise.

    Raises:
        UsageError: a stack without vocabulary.
    """
    if not config.has_vocabulary:
        found = "--to genai of a stack without embedding and head"
        raise UsageError(found, "a model with a vocabulary, since onnxruntime-genai feeds token ids", "use --to onnx")
    padding = contract.padding_id(config)
    files = {contract.GENAI_CONFIG_FILE: _genai_config(config, text.special.ids, provider)}
    if text.tokenizer is not None:
        if TOKENIZER_CONFIG_FILE not in text.tokenizer_files:
            files[TOKENIZER_CONFIG_FILE] = "{}\n"
        if text.tokenizer.id_to_token(padding) is not None:
            files[TOKENIZER_FILE] = _without_padding(text.tokenizer, padding)
    return files


def genai_notes(text: CarriedText, dtype: str) -> tuple[str, ...]:
    """What the user should know about running this model there."""
    notes = []
    if text.tokenizer is None:
        notes.append(f"no {TOKENIZER_FILE}: onnxruntime-genai can run token ids only")
    elif TOKENIZER_FILE in text.made:
        notes.append(
            "onnxruntime-genai reads the tokenizer that was made otherwise than its library where a text has several "
            "spaces or characters without a token: give it token ids"
        )
    if text.tokenizer is not None and text.tokenizer.num_special_tokens_to_add(False):
        notes.append("the tokenizer adds special tokens to a text, and onnxruntime-genai's encode does not")
    if dtype == "bfloat16":
        notes.append("bfloat16 needs CUDA: ONNX Runtime's CPU provider has no kernels for it")
    return tuple(notes)


def _genai_config(config: RetNetConfig, special: Mapping[str, Sequence[int]], provider: str | None) -> str:
    """The document as JSON.

    Args:
        special: ids of the tokens that end (`eos`) and start (`bos`) a text. Without any end the padding token stands
            in, which is never generated.
        provider: where it runs, in onnxruntime-genai's words; None for the CPU. A graph with branches and loops cannot
            be captured as a CUDA graph; products stay float32.
    """
    padding = contract.padding_id(config)
    ends, starts = list(special.get("eos", ())) or [padding], special.get("bos", ())
    model = {
        "type": "decoder",
        "vocab_size": config.vocab_size + 1,
        "context_length": contract.MAX_POSITION + 1,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": padding,
        **({"bos_token_id": starts[0]} if starts else {}),
        "decoder": {
            "filename": contract.GENAI_FILE,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_size": config.head_k_dim,
            "session_options": {"provider_options": [] if provider is None else [{provider: PROVIDER_OPTIONS}]},
            "inputs": {
                "input_ids": contract.INPUT_IDS,
                "position_ids": contract.POSITION_IDS,
                "past_conv_names": contract.PAST_CONV_NAMES,
                "past_recurrent_names": contract.PAST_NAMES,
            },
            "outputs": {
                "logits": contract.LOGITS,
                "present_conv_names": contract.PRESENT_CONV_NAMES,
                "present_recurrent_names": contract.PRESENT_NAMES,
            },
        },
    }
    # One buffer for both states would have to be read to its end before it is written.
    search = {"do_sample": False, "num_beams": 1, "max_length": DEFAULT_MAX_LENGTH, "past_present_share_buffer": False}
    return json.dumps({"model": model, "search": search}, indent=1) + "\n"


def _without_padding(tokenizer: Any, padding: int) -> str:
    """The tokenizer with the token of this id, which the model has no row for, moved past all others.

    As it is, a prompt with it would be taken for padding; any other id past the embedding the graph refuses.
    """
    data = json.loads(tokenizer.to_str())
    free = 1 + max(tokenizer.get_vocab().values())
    for token in data["added_tokens"]:
        token["id"] = free if token["id"] == padding else token["id"]
    # Ids of added tokens are counted when the file is read, but for those that the vocabulary names.
    ids = {token["content"]: token["id"] for token in data["added_tokens"]}
    vocab = data["model"]["vocab"]
    if isinstance(vocab, dict):
        vocab |= ids | {tokenizer.id_to_token(padding): free}
    else:
        lowest = min(score for _, score in vocab)
        vocab += [[f" {number}", lowest] for number in range(len(vocab), free + 1)]
        vocab[padding], vocab[free] = [f" {padding}", lowest], [tokenizer.id_to_token(padding), vocab[padding][1]]
        for word, number in ids.items():
            vocab[number] = [word, vocab[number][1]]
    return json.dumps(data, ensure_ascii=False)
